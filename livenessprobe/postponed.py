"""Postponing imports: a module that libraries import but this program hardly ever uses is loaded at its first use.

http.server, protobuf and prometheus_client import email, ssl, gzip and more for features that are not used here.
importlib.util.LazyLoader is of no use: what a library copies at its import would load the module.
"""

import importlib
import sys
import threading
import types
from collections.abc import Mapping

# What every run imports in vain, by whom, and the attributes that are copied or used at import, with stand-ins for them.
UNUSED: dict[str, Mapping[str, object]] = {
    # logging, for formats and exceptions that are not ours; log.py, for --vmodule
    "fnmatch": {},
    "string": {"Formatter": object, "Template": None},
    "traceback": {},
    # protobuf
    "google.protobuf.descriptor_database": {},
    "google.protobuf.internal.python_message": {},
    "google.protobuf.internal.well_known_types": {"WKTBASES": {}},
    "google.protobuf.text_encoding": {},
    "google.protobuf.text_format": {},
    "pickle": {},
    # grpc: its second half, which wants TLS as well, of which the image has nothing
    "asyncio": {},
    "grpc.aio": {},
    "inspect": {},
}
# The same, by what only serving loads.
UNUSED_SERVING: dict[str, Mapping[str, object]] = {
    # http.server
    "copy": {},
    "datetime": {},
    "email.utils": {},
    "html": {},
    "http.client": {"HTTPMessage": None},
    "mimetypes": {},
    "shutil": {},
    # Also prometheus_client, for what serves and pushes there.
    "socketserver": {
        **dict.fromkeys(("StreamRequestHandler", "TCPServer"), object),
        "ThreadingMixIn": type("ThreadingMixIn", (), {}),
    },
    "urllib.parse": dict.fromkeys(("parse_qs", "quote_plus", "urlparse")),
    # prometheus_client, which can also push, serve and compress
    "base64": {},
    "gzip": {},
    "ipaddress": {},
    "json": {},
    "prometheus_client.asgi": {"make_asgi_app": None},
    "prometheus_client.decorator": {"decorate": None},
    "prometheus_client.gc_collector": dict.fromkeys(("GC_COLLECTOR", "GCCollector")),
    "prometheus_client.platform_collector": dict.fromkeys(("PLATFORM_COLLECTOR", "PlatformCollector")),
    "ssl": dict.fromkeys(("PROTOCOL_TLS_CLIENT", "PROTOCOL_TLS_SERVER", "SSLContext", "TLSVersion")),
    "urllib.error": {"HTTPError": None},
    "urllib.request": {
        **dict.fromkeys(("BaseHandler", "HTTPHandler", "HTTPRedirectHandler", "HTTPSHandler"), object),
        **dict.fromkeys(("Request", "build_opener")),
    },
    "wsgiref.simple_server": {"WSGIRequestHandler": object, "WSGIServer": object, "make_server": None},
}

_lock = threading.Lock()


class Postponed(types.ModuleType):
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> object:
        # The import system asks for such names, not a user of the module.
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(load(self.__name__), name)


def postpone(modules: Mapping[str, Mapping[str, object]]) -> None:
    """Have modules loaded at their first use only; a module that is loaded already stays as it is.

    The attributes given for a module are there without loading it.
    """
    for name, attributes in modules.items():
        if name not in sys.modules:
            module = sys.modules[name] = Postponed(name)
            vars(module).update(attributes)
            package, _, child = name.rpartition(".")
            # For `import package.child`. The libraries' packages are loaded late too, and do without.
            if package in sys.stdlib_module_names:
                setattr(importlib.import_module(package), child, module)


def load(name: str) -> types.ModuleType:
    """Load a module in earnest, though it may be postponed; return it."""
    with _lock:  # otherwise two threads remove it, and the second one removes what the first is loading
        if isinstance(sys.modules.get(name), Postponed):
            del sys.modules[name]
    return importlib.import_module(name)  # without the lock: it waits for other threads' imports
