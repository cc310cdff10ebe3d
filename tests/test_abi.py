"""ucxgossip.ucp.abi: sizes, offsets and values are those of the installed wheel's headers."""

import ctypes
import importlib.util
import inspect
import shutil
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from ucxgossip.ucp import abi

STRUCTS: dict[type[ctypes.Structure], str] = {
    abi.SockAddr: "ucs_sock_addr_t",
    abi.Params: "ucp_params_t",
    abi.CpuSet: "ucs_cpu_set_t",
    abi.WorkerParams: "ucp_worker_params_t",
    abi.WorkerAttr: "ucp_worker_attr_t",
    abi.EpParams: "ucp_ep_params_t",
    abi.TransportEntry: "ucp_transport_entry_t",
    abi.EpAttr: "ucp_ep_attr_t",
    abi.MemMapParams: "ucp_mem_map_params_t",
    abi.MemAttr: "ucp_mem_attr_t",
    abi.RequestParam: "ucp_request_param_t",
    abi.AmHandlerParam: "ucp_am_handler_param_t",
}

NESTED = {
    (abi.EpParams, "err_handler_cb"): "err_handler.cb",
    (abi.EpParams, "err_handler_arg"): "err_handler.arg",
    (abi.EpAttr, "transports_entries"): "transports.entries",
    (abi.EpAttr, "transports_num_entries"): "transports.num_entries",
    (abi.EpAttr, "transports_entry_size"): "transports.entry_size",
}
"""Fields that stand in a struct or union of their own in C."""

FIRST_APPENDED = {
    abi.Params: "node_local_id",
    abi.RequestParam: "remote_datatype",
}
"""The first field that releases after 1.13 appended; other structs are as long as in C."""

ENUMS: dict[type[IntEnum], str] = {
    abi.Status: "UCS_",
    abi.Feature: "UCP_FEATURE_",
    abi.ParamField: "UCP_PARAM_FIELD_",
    abi.WorkerParamField: "UCP_WORKER_PARAM_FIELD_",
    abi.WorkerAttrField: "UCP_WORKER_ATTR_FIELD_",
    abi.EpParamField: "UCP_EP_PARAM_FIELD_",
    abi.EpAttrField: "UCP_EP_ATTR_FIELD_",
    abi.MemMapField: "UCP_MEM_MAP_PARAM_FIELD_",
    abi.MemAttrField: "UCP_MEM_ATTR_FIELD_",
    abi.OpAttr: "UCP_OP_ATTR_FIELD_",
    abi.AmHandlerField: "UCP_AM_HANDLER_PARAM_FIELD_",
}

CONSTANTS = {
    "OP_FAST_COMPLETION": "UCP_OP_ATTR_FLAG_FAST_CMPL",
    "MEMORY_TYPE_CUDA": "UCS_MEMORY_TYPE_CUDA",
    "ERR_LAST": "UCS_ERR_LAST",
    "MEM_MAP_ALLOCATE": "UCP_MEM_MAP_ALLOCATE",
    "EP_CLOSE_FORCE": "UCP_EP_CLOSE_FLAG_FORCE",
    "AM_FLAG_WHOLE_MSG": "UCP_AM_FLAG_WHOLE_MSG",
    "AM_SEND_EAGER": "UCP_AM_SEND_FLAG_EAGER",
    "AM_SEND_COPY_HEADER": "UCP_AM_SEND_FLAG_COPY_HEADER",
    "THREAD_MODE_SERIALIZED": "UCS_THREAD_MODE_SERIALIZED",
    "ERR_HANDLING_NONE": "UCP_ERR_HANDLING_MODE_NONE",
    "ERR_HANDLING_PEER": "UCP_ERR_HANDLING_MODE_PEER",
}


def questions() -> Iterator[tuple[str, int]]:
    """C expressions, each with the value that `abi` has for it."""
    yield "sizeof(ucs_status_t)", 1
    yield f"UCP_API_VERSION >= UCP_VERSION{abi.API_VERSION}", 1
    for struct, c_name in STRUCTS.items():
        for name, kind in struct._fields_:  # type: ignore[misc]
            field = NESTED.get((struct, name), name)
            yield f"offsetof({c_name}, {field})", getattr(struct, name).offset
            yield f"sizeof((({c_name} *)0)->{field})", ctypes.sizeof(kind)
        if struct in FIRST_APPENDED:
            appended = f"offsetof({c_name}, {FIRST_APPENDED[struct]})"
            yield appended, ctypes.sizeof(struct)
        else:
            yield f"sizeof({c_name})", ctypes.sizeof(struct)
    for enum, prefix in ENUMS.items():
        yield from ((prefix + member.name, int(member)) for member in enum)
    yield from ((c_name, getattr(abi, name)) for name, c_name in CONSTANTS.items())


QUESTIONS = dict(questions())


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say to each question, by one compiled C program."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    wheel = importlib.util.find_spec("libucx")
    if wheel is None or wheel.origin is None:
        pytest.skip("no libucx wheel, hence no headers")
    headers = Path(wheel.origin).parent / "include"
    folder = tmp_path_factory.mktemp("abi")
    prints = "\n".join(f'    printf("%lld\\n", (long long)({asked}));' for asked in QUESTIONS)
    (folder / "abi.c").write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <ucp/api/ucp.h>\n"
        f"int main(void) {{\n{prints}\n    return 0;\n}}\n"
    )
    subprocess.run(
        [compiler, "-w", "-o", str(folder / "abi"), f"-I{headers}", str(folder / "abi.c")],
        check=True,
        timeout=60,
    )
    run = [str(folder / "abi")]
    printed = subprocess.run(run, check=True, timeout=60, capture_output=True, text=True).stdout
    return dict(zip(QUESTIONS, map(int, printed.splitlines()), strict=True))


@pytest.mark.parametrize("asked", QUESTIONS)
def test_as_in_the_headers(asked: str, answers: dict[str, int]) -> None:
    assert QUESTIONS[asked] == answers[asked]


def own_members(kind: Any) -> set[Any]:
    return {
        value
        for value in vars(abi).values()
        if inspect.isclass(value) and issubclass(value, kind) and value.__module__ == abi.__name__
    }


def test_nothing_in_abi_is_left_out() -> None:
    assert own_members(ctypes.Structure) == set(STRUCTS)
    assert own_members(int) == set(ENUMS)
    numbers = {name for name, value in vars(abi).items() if type(value) is int}
    assert numbers == set(CONSTANTS)
