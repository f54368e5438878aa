"""Bytes of a run on Flower's wire, compressed and as plain fp32 A and B; loss and accuracy over seeds.

    python benchmarks/traffic.py            # an hour on two cores; goes on where it was interrupted
    python benchmarks/traffic.py --metered  # the bytes alone; nothing written

Bytes are of the demo's job. Flower counts what nodes fetch and deliver, which no node of a simulation does: there `flwr
list` says 0. So every message of the run is made and measured as Flower's SuperLink does. Batches are small, as no
message's size depends on records. Loss and accuracy are of aggregation.toml: the same task and model, one adapted
layer, so that many runs fit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from aggregation import rows_file
from clipping import RESULTS, machine
from cotune.server.conduct import conduct
from cotune.server.fleet import Request
from cotune.shared.datasets import dataset_path
from cotune.shared.files import read_lines, write_json
from cotune.shared.plan import ClaimRequest, LedgerRequest
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import (
    adapter_to_record,
    answer_from_records,
    answer_to_records,
    ledger_to_records,
    plan_from_records,
    plan_to_records,
    request_to_records,
    signature_to_records,
)
from cotune.simulations.scenario import answer_plan, begin, prepare_run, read_ledger, sign_claim, site_names

JOB = "recipe:icd10-routing"
TRAINED, SEEDS = Path(__file__).parent / "aggregation.toml", "1,2,3"
TARGET = 8.0  # times fewer bytes than PLAIN
PLAIN = "fedavg_ab, fp32"
CODECS = ("transport.codec_up", "transport.codec_down")
SETTINGS = {
    PLAIN: ("fedavg_ab", "fp32", "fp32"),
    "ffa, int8": ("ffa", "int8", "int8"),
    "ffa, int4 up": ("ffa", "int4", "int8"),
}
RATES = {"ffa": 320, "fedavg_ab": 10}  # the best that aggregation.py found
FEW_ROWS = 16
Setting = tuple[str, str, str]  # rule, codec up, codec down


def main() -> None:
    """Measure every setting, print a line each, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metered", action="store_true", help="the bytes alone; nothing written")
    parser.add_argument("--out", type=Path, default=Path("comparisons/traffic"), help="folder of the comparisons")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": machine(),
        "job": JOB,
        "trained": TRAINED.name,
        "load_average": [psutil.getloadavg()[0]],
        "settings": {},
    }
    report["machine"]["versions"] |= {"flwr": version("flwr")}
    for title, setting in SETTINGS.items():
        with tempfile.TemporaryDirectory(prefix="cotune-benchmark-") as folder:
            found = dict(zip(("rule", *CODECS), setting, strict=True)) | metered(setting, Path(folder))
        found |= {} if options.metered else trained(title, setting, options.out.resolve())
        report["settings"][title] = found
        found["times_fewer"] = report["settings"][PLAIN]["bytes"] / found["bytes"]
        _show(title, found)
    if not options.metered:
        slug = re.sub(r"[^a-z0-9]+", "-", f"{report['machine']['name']} {report['machine']['cores']} cores".lower())
        write_json(RESULTS / f"traffic-{slug}.json", report)


@dataclass
class Metered:
    """The sites of a run, in this process, reached through Flower's messages, whose bytes are added up.

    Attributes:
        names: Of the sites.
        to_sites: Bytes of all plans and requests.
        to_coordinator: Bytes of all answers and ledgers.
    """

    names: Sequence[str]
    to_sites: int = 0
    to_coordinator: int = 0

    def sites(self) -> Sequence[str]:
        """Names of the sites, in order."""
        return self.names

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Train each site in turn on what came out of its message."""
        for plan, payload in requests:
            sent = plan_to_records(plan, adapter_to_record(payload))
            given = answer_to_records(answer_plan(*plan_from_records(sent)))
            self._count(sent, given, MessageType.TRAIN)
            yield answer_from_records(given, plan.site)

    def ledgers(self, requests: Sequence[LedgerRequest]) -> Iterator[tuple[str, bytes]]:
        """Each site's ledger."""
        for request in requests:
            ledger = read_ledger(request)
            self._count(request_to_records(request), ledger_to_records(ledger), MessageType.QUERY)
            yield request.site, ledger

    def countersign(self, requests: Sequence[ClaimRequest]) -> Iterator[tuple[str, str | SiteFailure]]:
        """Each site's signature of the claim."""
        for request in requests:
            signature = sign_claim(request)
            self._count(request_to_records(request), signature_to_records(signature), MessageType.QUERY)
            yield request.site, signature

    def _count(self, sent: RecordDict, given: RecordDict, kind: str) -> None:
        message = Message(sent, dst_node_id=1, message_type=kind)
        self.to_sites += wire_bytes(message)
        self.to_coordinator += wire_bytes(Message(given, reply_to=message))


def wire_bytes(message: Message) -> int:
    """What Flower's SuperLink counts for a message that a node fetches or delivers: frame, tree and every object."""
    objects = get_all_nested_objects(message).values()
    frame = message_to_proto(remove_content_from_message(message)).ByteSize() + get_object_tree(message).ByteSize()
    return frame + sum(len(each.deflate()) for each in objects)


def metered(setting: Setting, folder: Path) -> dict[str, Any]:
    """Bytes of the demo's run by Flower's count, and by cotune's own, which leaves Flower's frames out."""
    rows = folder / "few.jsonl"  # nobody looks at the scores
    lines = dataset_path("icd10/eval.jsonl").read_text(encoding="utf-8").splitlines()[:FEW_ROWS]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    small = ["train.batch_size=4", f"eval.data={rows}", "eval.every=99"]
    run = prepare_run(JOB, [*small, f"aggregation.rule={setting[0]}", *_codecs(setting)], folder, lambda _line: None)
    begin(run, folder / "kept")
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # no message can be made without
    fleet = Metered(site_names(run.job()))
    conduct(run, fleet, "inline", folder / "kept")
    summary = run.summary()
    own = {name: summary[name] for name in ("bytes_up", "bytes_down")}
    total = fleet.to_sites + fleet.to_coordinator
    return {"bytes": total, "to_sites": fleet.to_sites, "to_coordinator": fleet.to_coordinator, **own}


def trained(title: str, setting: Setting, out: Path) -> dict[str, Any]:
    """Loss and accuracy of the job over seeds, by `cotune compare`."""
    name = re.sub(r"[^a-z0-9_]+", "-", title)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cotune.shared.cli", "compare", str(TRAINED), f"data.train={rows_file(out)}"]
    command += [*_codecs(setting), f"train.learning_rate={RATES[setting[0]]}"]
    command += ["--rules", setting[0], "--epsilons", "8", "--seeds", SEEDS]
    command += ["--out", str(out), "--name", name, "--kept", str(out / "kept")]
    subprocess.run(command, check=True)
    lines = [line for line in read_lines(out / name / "results.jsonl") if line["counted"]]
    columns = ("seed", "learning_rate", "loss", "accuracy", "loss_base", "accuracy_base", "epsilon_spent")
    return {"seeds": [{column: line[column] for column in columns} for line in lines]}


def _codecs(setting: Setting) -> list[str]:
    return [f"{name}={codec}" for name, codec in zip(CODECS, setting[1:], strict=True)]


def _show(title: str, found: Mapping[str, Any]) -> None:
    scores = ""
    for name in ("loss", "accuracy") if "seeds" in found else ():
        values = [line[name] for line in found["seeds"]]
        scores += f"; {name} {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    met = f"{found['times_fewer']:.1f} times fewer" if title != PLAIN else f"target: {TARGET:g} times fewer"
    sys.stdout.write(f"{title:<16} {found['bytes'] / 1000:,.0f} kB a run, {met}{scores}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
