"""Telling Flower's SuperLink what to do, through Flower's own program `flwr`: its protocol changes every month."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cotune.shared.errors import ConnectionFailed, CotuneError

CONNECTION = "cotune"
PATIENCE_S = 120.0
UNREACHABLE = "is unavailable"
TAKEN = re.compile(r"\[code: 23\]")


@dataclass(frozen=True, repr=False)
class Control:
    """A SuperLink, as the settings in an environment name it.

    Attributes:
        environment: For the program; its FLWR_HOME holds a connection called `cotune`.
    """

    environment: Mapping[str, str]

    def register(self, node_key: str) -> int | None:
        """Let a node's key in; its number, or None if that key was registered before: Flower takes a key once.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        with TemporaryDirectory() as folder:
            file = Path(folder) / "node.pub"
            file.write_text(node_key + "\n", encoding="utf-8")
            answer = self._ask(["supernode", "register", str(file), CONNECTION])
        if answer.get("success"):
            return int(answer["node-id"])
        if TAKEN.search(_words(answer)):
            return None
        raise _refused(answer)

    def unregister(self, node_id: int) -> None:
        """Let a node in no more, for good.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        self._tell(["supernode", "unregister", str(node_id), CONNECTION])

    def nodes(self) -> dict[int, str]:
        """The nodes that are registered: number to status, `registered`, `online` or `offline`.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        rows = self._tell(["supernode", "list", CONNECTION])["nodes"]
        return {int(row["node-id"]): str(row["status"]) for row in rows if row["status"] != "unregistered"}

    def run(self, bundle: Path, config: Mapping[str, str], simulation: Mapping[str, int | float] | None = None) -> str:
        """Start a run and return its number.

        Args:
            bundle: The folder of the Flower app.
            config: Settings of the app.
            simulation: Settings of Flower's simulation engine, if it is one.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        command = ["run", str(bundle), CONNECTION, "--run-config", _pairs(config)]
        if simulation is not None:
            command += ["--federation-config", _pairs(simulation)]
        return str(self._tell(command)["run-id"])

    def stop(self, run_id: str) -> None:
        """Stop a run.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        self._tell(["stop", run_id, CONNECTION])

    def runs(self) -> dict[str, str]:
        """Flower's runs: number to status, `pending`, `starting`, `running` or `finished:...`.

        Raises:
            ConnectionFailed: E-SUPERLINK, E-CONTROL.
        """
        rows = self._tell(["list", CONNECTION])["runs"]
        return {str(row["run-id"]): str(row["status"]) for row in rows}

    def log(self, run_id: str, file: Path) -> None:
        """Append to a file what Flower's processes said in a run, which the SuperLink keeps only while it runs."""
        with file.open("ab") as output:
            subprocess.run(
                ["flwr", "log", run_id, CONNECTION, "--show"],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=PATIENCE_S,
                check=False,
            )

    def _tell(self, command: Sequence[str]) -> dict[str, Any]:
        answer = self._ask(command)
        if not answer.get("success"):
            raise _refused(answer)
        return answer

    def _ask(self, command: Sequence[str]) -> dict[str, Any]:
        try:
            done = subprocess.run(
                ["flwr", *command, "--format", "json"],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _unreachable(f"did not answer for {PATIENCE_S:.0f} s") from None
        try:
            return json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            return {"success": False, "error-message": (done.stdout + done.stderr)[-1000:]}


def _pairs(settings: Mapping[str, str | int | float]) -> str:
    return " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())


def _words(answer: Mapping[str, Any]) -> str:
    return str(answer.get("error-message", "")).partition("\n\n")[2] or str(answer.get("error-message", ""))


def _refused(answer: Mapping[str, Any]) -> CotuneError:
    words = " ".join(_words(answer).split())
    if UNREACHABLE in words:
        return _unreachable("cannot be reached")
    return ConnectionFailed("E-CONTROL", f"Flower refused: {words or 'it gave no reason'}")


def _unreachable(what: str) -> ConnectionFailed:
    return ConnectionFailed("E-SUPERLINK", f"Flower's SuperLink {what}", hint="cotune fed up")
