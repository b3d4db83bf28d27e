"""From a configuration to a running application on this machine, and back to nothing.

Ray is imported late: its own environment has to be set first, and the command line must not wait
for it.
"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from typing import Any

from server.config import HttpConfig, ServeConfig
from server.errors import StartError
from server.log_pipe import LogPipe
from server.messages import Readiness
from server.settings import (
    Settings,
    clear_environment,
    extended_environment,
    set_default_environment,
)

NAMESPACE = "darkroom"

RAY_ENVIRONMENT = {
    # No outgoing connection, and no reports of use to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Processes start when they are needed: on one machine all that are needed are known.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # Ray would run everything that serves at the lowest priority but one.
    "RAY_worker_niceness": "0",
    # Serve's controller looks at everything ten times a second otherwise: 3 % of a core, idle.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # A busy machine is slow to say how busy it is; asking again at once makes that worse.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
}
REPLICA_ENVIRONMENT = {
    # One event loop a process: two more threads, and hops between them, cost 3 ms a call.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""For Ray's children and not for us: a handle without a loop of its own needs asyncio around it."""
_OBJECT_STORE_BYTES = 256 << 20
_READY_TIMEOUT_S = 60.0
"""For gateway, router and workers to hear of each other once all of them are up."""
_LAST_WORDS_S = 15.0
"""Beyond the drain timeout, for gateways to answer that they have drained."""


def check_port(http: HttpConfig) -> None:
    """Refuse a port that somebody listens on: gateways share ports, and would share that one too.

    Raises:
        StartError: the address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            http.host, http.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise StartError(f"cannot listen on {http.host}:{http.port}: {error.strerror}") from error


class Application:
    """The application on Ray: started, waited for, drained. Used once, from one thread."""

    def __init__(self, config: ServeConfig, *, address: str | None = None) -> None:
        self._config = config
        self._address = address
        self._gateway: Any = None
        self._stop = threading.Event()
        self._log: LogPipe | None = None
        self._session: str | None = None

    def start(self) -> Readiness:
        """Start Ray, or join the cluster at ``address``; wait until the application is warm.

        Raises:
            StartError: it did not come up; what had come up is down again.
        """
        set_default_environment(RAY_ENVIRONMENT)
        try:
            self._start_ray()
            return self._start_application()
        except BaseException:
            self._end_ray()
            raise

    def wait(self) -> None:
        """Return at SIGTERM or SIGINT. A second one ends the process as it is.

        The handlers are installed here because Ray and Serve have installed theirs by now, which
        would kill the replicas with requests in flight.
        """

        def stop(number: int, _: object) -> None:
            if self._stop.is_set():
                raise SystemExit(128 + number)
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self._stop.wait()

    def drain(self) -> None:
        """Refuse what is new, finish what is in flight within the drain timeout, end everything."""
        timeout_s = self._config.drain_timeout_s + _LAST_WORDS_S
        try:
            self._gateway.broadcast("drain").results(timeout_s=timeout_s, return_exceptions=True)
        except TimeoutError:
            pass  # some gateway hangs: it had its time
        finally:
            self._end_ray()

    # ------------------------------------------------------------------ inside

    def _start_ray(self) -> None:
        import ray

        if self._address is not None:
            self._join(self._address)
        else:
            self._log = LogPipe()
            # Ray's own default keeps every session's logs for ever.
            self._session = tempfile.mkdtemp(prefix="dr-")
            workers = self._config.workers
            most = workers.max_replicas or workers.replicas
            with extended_environment(REPLICA_ENVIRONMENT):
                ray.init(
                    address="local",
                    namespace=NAMESPACE,
                    _temp_dir=self._session,
                    # A figure for Ray's book-keeping: what the workers will ask for, together.
                    num_cpus=most * workers.threads_of(Settings.from_environment().threads),
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
            _end_spare_processes()
            self._check_gpus()
        # Of an environment that is shared with a node's; Serve reads it when it is imported.
        clear_environment(REPLICA_ENVIRONMENT)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})

    def _join(self, address: str) -> None:
        import ray

        try:
            ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="error"
            )
        except ConnectionError as error:
            raise StartError(
                f"cannot join the Ray cluster at {address}: nobody answers there, or not without"
                " the cluster's token (RAY_AUTH_MODE=token, and what `ray get-auth-token` prints"
                " on its head)"
            ) from error

    def _check_gpus(self) -> None:
        """Refuse at once what Ray would wait for for ever."""
        import ray

        workers = self._config.workers
        here = ray.cluster_resources().get("GPU", 0.0)
        if workers.device == "cuda" and here < workers.replicas:
            raise StartError(
                f"workers.device is cuda: {workers.replicas} GPUs are needed, {here:.0f} are here"
            )

    def _start_application(self) -> Readiness:
        from ray import serve

        from server.app import NAME, application

        graph = application(self._config, self._log.path if self._log else None)
        try:
            self._gateway = serve.run(graph, name=NAME, route_prefix=None)
        except RuntimeError as error:
            raise StartError(why(serve.status().applications.get(NAME), error)) from error
        until_s = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < until_s:
            readiness: Readiness = self._gateway.readiness.remote().result()
            if readiness.ready:
                return readiness
            time.sleep(0.1)
        raise StartError(f"no worker has reported within {_READY_TIMEOUT_S:.0f} s")

    def _end_ray(self) -> None:
        """End the processes. What was to be finished is: on a Ray of our own nobody is asked."""
        import ray

        if self._address is not None and self._gateway is not None:
            from ray import serve

            from server.app import NAME

            serve.delete(NAME)
        ray.shutdown()
        if self._session is not None:
            shutil.rmtree(self._session, ignore_errors=True)
        if self._log is not None:
            self._log.close()


def _end_spare_processes() -> None:
    """End what Ray starts for clusters, and nobody asks for on one machine: 290 MB.

    The dashboard's head (there without a dashboard too), the monitor that adds nodes, and the one
    that prints logs at the driver, which :mod:`server.log_pipe` does. Ray has no option for any.
    """
    from ray._private import worker

    node = worker._global_node
    node.kill_dashboard(check_alive=False)
    node.kill_monitor(check_alive=False)
    node.kill_log_monitor(check_alive=False)


_ERROR_LINE = re.compile(r"^(?:[\w.]*\.)?(\w+(?:Error|Exception)): (.+)$", re.MULTILINE)


def why(status: Any, error: Exception) -> str:
    """The innermost error of a replica that did not start, out of Serve's status."""
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    found = [match for message in messages for match in _ERROR_LINE.findall(message)]
    found = [(kind, text) for kind, text in found if not kind.startswith(("Ray", "Runtime"))]
    return ": ".join(found[-1]) if found else str(error)
