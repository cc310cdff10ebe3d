"""Constants and structs of UCX's C API (ucp.h, ucp_def.h, ucs/type/status.h).

Only what we pass, in the layout of API 1.13: later releases append fields, and
``ucp_init_version`` is asked for `API_VERSION`, so that one set of structs serves all.
tests/test_abi.py holds sizes and offsets against the headers of the installed wheel.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag

API_VERSION = (1, 13)

Handle = ctypes.c_void_p
size_t = ctypes.c_size_t
uint64 = ctypes.c_uint64


class Status(IntEnum):
    """``ucs_status_t``: one signed byte."""

    OK = 0
    INPROGRESS = 1
    ERR_NO_MESSAGE = -1
    ERR_NO_RESOURCE = -2
    ERR_IO_ERROR = -3
    ERR_NO_MEMORY = -4
    ERR_INVALID_PARAM = -5
    ERR_UNREACHABLE = -6
    ERR_INVALID_ADDR = -7
    ERR_NOT_IMPLEMENTED = -8
    ERR_MESSAGE_TRUNCATED = -9
    ERR_NO_PROGRESS = -10
    ERR_BUFFER_TOO_SMALL = -11
    ERR_NO_ELEM = -12
    ERR_SOME_CONNECTS_FAILED = -13
    ERR_NO_DEVICE = -14
    ERR_BUSY = -15
    ERR_CANCELED = -16
    ERR_SHMEM_SEGMENT = -17
    ERR_ALREADY_EXISTS = -18
    ERR_OUT_OF_RANGE = -19
    ERR_TIMED_OUT = -20
    ERR_EXCEEDS_LIMIT = -21
    ERR_UNSUPPORTED = -22
    ERR_REJECTED = -23
    ERR_NOT_CONNECTED = -24
    ERR_CONNECTION_RESET = -25
    ERR_ENDPOINT_TIMEOUT = -80


ERR_LAST = -100
"""Pointers in [ERR_LAST, 0) are errors (``UCS_PTR_IS_ERR``)."""


class Feature(IntFlag):
    """``ucp_feature``."""

    RMA = 1 << 1
    WAKEUP = 1 << 4
    AM = 1 << 6


class ParamField(IntFlag):
    """``ucp_params_field``."""

    FEATURES = 1 << 0
    ESTIMATED_NUM_EPS = 1 << 6
    NAME = 1 << 8


class WorkerParamField(IntFlag):
    """``ucp_worker_params_field``."""

    THREAD_MODE = 1 << 0


class WorkerAttrField(IntFlag):
    """``ucp_worker_attr_field``."""

    ADDRESS = 1 << 1


class EpParamField(IntFlag):
    """``ucp_ep_params_field``."""

    REMOTE_ADDRESS = 1 << 0
    ERR_HANDLING_MODE = 1 << 1


class EpAttrField(IntFlag):
    """``ucp_ep_attr_field``."""

    TRANSPORTS = 1 << 3


class MemMapField(IntFlag):
    """``ucp_mem_map_params_field``."""

    ADDRESS = 1 << 0
    LENGTH = 1 << 1
    FLAGS = 1 << 2
    MEMORY_TYPE = 1 << 4


class MemAttrField(IntFlag):
    """``ucp_mem_attr_field``."""

    ADDRESS = 1 << 0
    LENGTH = 1 << 1


class OpAttr(IntFlag):
    """``ucp_op_attr_t``."""

    CALLBACK = 1 << 1
    FLAGS = 1 << 4
    MEMORY_TYPE = 1 << 6
    MEMH = 1 << 8


class AmHandlerField(IntFlag):
    """``ucp_am_handler_param_field``."""

    ID = 1 << 0
    FLAGS = 1 << 1
    CB = 1 << 2
    ARG = 1 << 3


MEMORY_TYPE_CUDA = 1
"""``UCS_MEMORY_TYPE_CUDA``."""

MEM_MAP_ALLOCATE = 1 << 1
EP_CLOSE_FORCE = 1 << 0
AM_FLAG_WHOLE_MSG = 1 << 0
AM_SEND_EAGER = 1 << 1
AM_SEND_COPY_HEADER = 1 << 3
OP_FAST_COMPLETION = 1 << 17
THREAD_MODE_SERIALIZED = 1
ERR_HANDLING_NONE = 0
ERR_HANDLING_PEER = 1


class SockAddr(ctypes.Structure):
    """``ucs_sock_addr_t``."""

    _fields_ = (("addr", Handle), ("addrlen", ctypes.c_uint32))


class Params(ctypes.Structure):
    """``ucp_params_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("features", uint64),
        ("request_size", size_t),
        ("request_init", Handle),
        ("request_cleanup", Handle),
        ("tag_sender_mask", uint64),
        ("mt_workers_shared", ctypes.c_int),
        ("estimated_num_eps", size_t),
        ("estimated_num_ppn", size_t),
        ("name", ctypes.c_char_p),
    )


class CpuSet(ctypes.Structure):
    """``ucs_cpu_set_t``: 1,024 bits."""

    _fields_ = (("ucs_bits", ctypes.c_ulong * 16),)


class WorkerParams(ctypes.Structure):
    """``ucp_worker_params_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("thread_mode", ctypes.c_int),
        ("cpu_mask", CpuSet),
        ("events", ctypes.c_uint),
        ("user_data", Handle),
        ("event_fd", ctypes.c_int),
        ("flags", uint64),
        ("name", ctypes.c_char_p),
        ("am_alignment", size_t),
        ("client_id", uint64),
    )


class WorkerAttr(ctypes.Structure):
    """``ucp_worker_attr_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("thread_mode", ctypes.c_int),
        ("address_flags", ctypes.c_uint32),
        ("address", Handle),
        ("address_length", size_t),
        ("max_am_header", size_t),
        ("name", ctypes.c_char * 32),
        ("max_debug_string", size_t),
    )


class EpParams(ctypes.Structure):
    """``ucp_ep_params_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("address", Handle),
        ("err_mode", ctypes.c_int),
        ("err_handler_cb", Handle),
        ("err_handler_arg", Handle),
        ("user_data", Handle),
        ("flags", ctypes.c_uint),
        ("sockaddr", SockAddr),
        ("conn_request", Handle),
        ("name", ctypes.c_char_p),
        ("local_sockaddr", SockAddr),
    )


class TransportEntry(ctypes.Structure):
    """``ucp_transport_entry_t``."""

    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class EpAttr(ctypes.Structure):
    """``ucp_ep_attr_t`` (``transports`` since API 1.14)."""

    _fields_ = (
        ("field_mask", uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("transports_entries", ctypes.POINTER(TransportEntry)),
        ("transports_num_entries", ctypes.c_uint),
        ("transports_entry_size", size_t),
        ("user_data", Handle),
    )


class MemMapParams(ctypes.Structure):
    """``ucp_mem_map_params_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("address", Handle),
        ("length", size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported_memh_buffer", Handle),
    )


class MemAttr(ctypes.Structure):
    """``ucp_mem_attr_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("address", Handle),
        ("length", size_t),
        ("mem_type", ctypes.c_int),
    )


class RequestParam(ctypes.Structure):
    """``ucp_request_param_t`` (up to ``memh``, API 1.13)."""

    _fields_ = (
        ("op_attr_mask", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("request", Handle),
        ("cb", Handle),
        ("datatype", uint64),
        ("user_data", Handle),
        ("reply_buffer", Handle),
        ("memory_type", ctypes.c_int),
        ("recv_info", Handle),
        ("memh", Handle),
    )


class AmHandlerParam(ctypes.Structure):
    """``ucp_am_handler_param_t``."""

    _fields_ = (
        ("field_mask", uint64),
        ("id", ctypes.c_uint),
        ("flags", ctypes.c_uint32),
        ("cb", Handle),
        ("arg", Handle),
    )
