"""The twenty ways in which DP training code is known to break its claim, each tried on ours.

Short on purpose: where a pitfall has a statistical side, the other modules here look at it in depth. A pitfall that
cannot happen by construction is tested as that construction.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tests.statistical.real import adapter_of, data_of, here, trainer_of
from tests.statistical.steps import Parts, planted, step, zeros
from tests.statistical.verdict import ALPHA

import cotune.client.training
from cotune.client.clipping import ClippedSum, PerUnit, clipped_sum
from cotune.client.data import SiteExamples, prepare
from cotune.client.gradients import PerExampleGradients
from cotune.client.guard import Guard
from cotune.client.home import SiteHome
from cotune.client.noise import draw_noise, privatise
from cotune.client.policy import DatasetPolicy
from cotune.client.randomness import secure_stream
from cotune.client.sampling import draw_batch
from cotune.client.site import Site
from cotune.client.training import RoundResult, Trainer
from cotune.server.aggregation.updates import weighted_mean
from cotune.server.checkpoint import Progress, save_checkpoint
from cotune.server.spool import Spool
from cotune.shared.adapter import Layout, fingerprint, flat_sha256
from cotune.shared.codec import decode, encode
from cotune.shared.errors import DataError, ModelError
from cotune.shared.features import Features
from cotune.shared.job import Job
from cotune.shared.jobfile import dump_toml
from cotune.shared.methods import initial_values, read
from cotune.shared.model import load_tokenizer, locate
from cotune.shared.plan import RoundPlan
from cotune.shared.privacy.accounting import epsilon
from cotune.shared.privacy.mechanism import Mechanism, mechanism_of
from cotune.shared.records import read_records
from cotune.shared.runs import create_run
from cotune.shared.update import AdapterUpdate

NOBODY = SiteExamples([], np.zeros(0, dtype=np.intp), 0)
ROWS_OF = {"p0": 3, "p1": 1, "p2": 8, "p3": 2}
MakeJob = Callable[..., Job]


@pytest.fixture
def job(unit_job: MakeJob) -> Job:
    return unit_job(ROWS_OF, train={"local_steps": 3})


def train(trainer: Trainer, data: SiteExamples, mechanism: Mechanism, seen: list[Any] | None = None) -> RoundResult:
    """A round of the real trainer; `seen` takes the adapter after each step."""
    adapter, kept = adapter_of(trainer), [] if seen is None else seen
    features = Features(trainer.network, data.examples)
    return trainer.train_round(
        here(trainer), data, features, mechanism, secure_stream(), lambda _: kept.append(adapter.read())
    )


class Home:
    """A simulated site at a home of its own, which answers plans."""

    def __init__(self, job: Job, folder: Path, name: str = "site-1") -> None:
        base = locate(job)
        self.job, self.trainer = job, trainer_of(job)
        self.trainer.model_sha256 = base.sha256
        self.home = SiteHome.simulated(folder / name, name, job, base.sha256)
        self.site = Site(Guard(self.home), self, None)

    def load(self, job: Job, site: str, dataset: DatasetPolicy) -> SiteExamples:
        assert (site, dataset.unit) == (self.site.name, job.data.unit)
        return data_of(job)

    def answer(self, run_id: str = "run-1", number: int = 1) -> AdapterUpdate:
        adapter = np.zeros(self.trainer.layout.size, dtype=np.float32)
        plan = RoundPlan(
            run_id=run_id,
            job=self.job,
            site=self.site.name,
            round=number,
            base_sha256=flat_sha256(adapter),
            rank=self.job.lora.r,
            frozen_sha256=fingerprint(initial_values(self.trainer.layout, self.job.run.seed)),
            clipping_norm=self.job.privacy.clipping_norm,
        )
        return self.site.train(plan, encode(adapter, "fp32", 0), self.trainer, lambda _step: None)


def correlation(first: Any, second: Any) -> float:
    """P-value of independence of two lists of numbers."""
    score = abs(float(np.corrcoef(first, second)[0, 1])) * math.sqrt(len(first))
    return float(2 * stats.norm.sf(score))


def test_pitfall_01_what_draws_the_batches_is_what_is_accounted(job: Job) -> None:
    """No loader shuffles: the trainer draws each batch by the very object that makes the event, and sizes vary."""
    mechanism, given, sizes = mechanism_of(job), [], []

    def draw(used: Mechanism, units: int, stream: Any) -> Any:
        given.append((used, units))
        sizes.append(len(draw_batch(used, units, stream)))
        return draw_batch(used, units, stream)

    with planted(Parts(draw_batch=draw)):
        train(trainer_of(job), data_of(job), mechanism)
    assert given == [(mechanism, 4)] * 3
    event = mechanism.event(3).to_dict()
    assert (event["steps"], event["sampling_probability"]) == (3, mechanism.sampling_probability)
    assert len({len(draw_batch(mechanism, 100, secure_stream())) for _ in range(100)}) > 5


@pytest.mark.parametrize(("batch", "records"), [(700, 1000), (64, 1000), (62, 500)])
def test_pitfall_02_the_rate_is_the_public_quotient_and_never_one_over_the_batches(
    make_job: MakeJob, batch: int, records: int
) -> None:
    job = make_job(
        data={"records_per_site": records},
        train={"batch_size": batch},
        privacy={"noise_multiplier": 1.0, "delta": 1e-5},
    )
    mechanism, stream = mechanism_of(job), secure_stream()
    assert (mechanism.sampling_probability, mechanism.expected_batch_size) == (batch / records, batch)
    count = sum(len(draw_batch(mechanism, 10_000, stream)) for _ in range(100))
    assert stats.binomtest(count, 1_000_000, batch / records).pvalue > ALPHA


def test_pitfall_03_the_divisor_is_public_whatever_was_drawn() -> None:
    mechanism = Mechanism(sampling_probability=0.1, expected_batch_size=10, clipping_norm=1.0, noise_multiplier=1e-9)
    for units in (0, 1, 3, 40):
        world = replace(zeros(units, 4), gradients=np.full((units, 4), 0.25))
        every = replace(mechanism, sampling_probability=1.0)
        assert step(Parts(), every, world, secure_stream()).gradient == pytest.approx(
            np.full(4, 0.25 * units / 10), abs=1e-6
        )


def test_pitfall_04_an_empty_batch_is_a_step_of_noise(job: Job) -> None:
    seen: list[Any] = []
    mechanism, trainer = mechanism_of(job), trainer_of(job)
    train(trainer, NOBODY, mechanism, seen)
    assert len(seen) == 3
    steps = np.diff([np.zeros_like(seen[0]), *seen], axis=0)
    assert (steps != 0).all()
    squares = float(np.square(steps * mechanism.expected_batch_size / mechanism.noise_standard_deviation).sum())
    assert ALPHA < stats.chi2.cdf(squares, steps.size) < 1 - ALPHA


def test_pitfall_05_a_record_that_overflows_counts_as_zero_and_spoils_nothing(unit_job: MakeJob) -> None:
    job = unit_job(ROWS_OF, data={"units_per_site": 4}, train={"batch_size": 4})
    trainer, data = trainer_of(job), data_of(job)
    features = Features(trainer.network, data.examples)
    for values in features.of(data.rows(2)[:1].tolist()) or []:
        values[:] = np.inf
    trainer.train_round(here(trainer), data, features, mechanism_of(job), secure_stream(), lambda _step: None)
    assert np.isfinite(adapter_of(trainer).read()).all()


def test_pitfall_06_a_step_is_one_draw_however_it_is_split(job: Job) -> None:
    counts = {"draw_batch": 0, "draw_noise": 0, "privatise": 0}

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(Parts(), name)

        def call(*given: Any) -> Any:
            counts[name] += 1
            return real(*given)

        return call

    split = job.replace(train={"microbatch": 1}, data={"units_per_site": 10})
    with planted(Parts(**{name: counted(name) for name in counts})):
        train(trainer_of(split), data_of(split), mechanism_of(split))
    assert counts == dict.fromkeys(counts, split.train.local_steps)
    assert mechanism_of(split).event(split.train.local_steps).to_dict()["steps"] == 3


@pytest.mark.parametrize("microbatch", [1, 3, 12])
def test_pitfall_07_noise_is_added_once_and_scaled_once(microbatch: int) -> None:
    mechanism = Mechanism(sampling_probability=1.0, expected_batch_size=12, clipping_norm=0.3, noise_multiplier=2.0)
    released = step(Parts(), mechanism, zeros(12, 5000), secure_stream(), microbatch).gradient
    squares = float(np.square(released.astype(np.float64) * 12 / 0.6).sum())
    assert ALPHA < stats.chi2.cdf(squares, 5000) < 1 - ALPHA


def test_pitfall_08_no_seed_of_anybodys_makes_two_sites_or_rounds_alike(unit_job: MakeJob, tmp_path: Path) -> None:
    """Equal records, equal jobs, equal global seeds: were noise alike too, the updates would be equal."""
    quiet = unit_job({"a": 1}, lora={"r": 8}, data={"units_per_site": 10**6}, train={"batch_size": 1})
    updates = []
    for site, run_id, number in (("site-1", "a", 1), ("site-1", "b", 1), ("site-1", "a", 2), ("site-2", "a", 1)):
        np.random.seed(5)
        torch.manual_seed(5)
        update = Home(quiet, tmp_path, site).answer(run_id, number)
        updates.append(decode(update.payload, "fp32", update.payload.size // 4))
    assert all(correlation(one, two) > ALPHA for i, one in enumerate(updates) for two in updates[:i])


def test_pitfall_09_noise_comes_from_the_operating_systems_key_alone() -> None:
    """No seed reaches it, it moves no global generator, and no client code names one."""
    mechanism = Mechanism(sampling_probability=1.0, expected_batch_size=1, clipping_norm=1.0, noise_multiplier=1.0)
    drawn = []
    for _ in range(2):
        np.random.seed(3)
        torch.manual_seed(3)
        drawn.append(draw_noise(mechanism, 1000, secure_stream()).gradient)
        assert np.random.random() == np.random.RandomState(3).random()
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert np.intersect1d(*drawn).size == 0
    assert correlation(*drawn) > ALPHA
    code = sorted(Path(str(cotune.client.training.__file__)).parent.glob("*.py"))
    assert [found for path in code for found in _generators(path)] == []
    seeded = [path.name for path in code if "reproducible_stream" in path.read_text(encoding="utf-8")]
    assert seeded == ["randomness.py", "site.py"], 'the one door to seeded noise is privacy.noise = "test"'


def _generators(path: Path) -> Iterator[str]:
    """Where a module's code asks another generator than our own for randomness."""
    names = {
        "rand",
        "randn",
        "randint",
        "randperm",
        "normal_",
        "manual_seed",
        "default_rng",
        "RandomState",
        "Generator",
    }
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield f"{path.name}:{node.lineno}: {node.attr}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if {"random", "numpy.random"} & set(named):
                yield f"{path.name}:{node.lineno}: {named}"


def test_pitfall_10_sums_and_noise_are_float64_until_they_are_joined() -> None:
    """Rounded before it is added, a sum shows through the gaps of the noise; so do coarse numbers."""
    mechanism = Mechanism(sampling_probability=1.0, expected_batch_size=1, clipping_norm=1.0, noise_multiplier=1.0)
    gradients = {"a": torch.full((3, 1, 1000), 1e-3, dtype=torch.float32)}
    clipped = clipped_sum(PerUnit(gradients, torch.zeros(3), torch.ones(3)), mechanism)
    noise = draw_noise(mechanism, 1000, secure_stream())
    assert clipped.gradient.dtype == noise.gradient.dtype == np.float64
    wanted = (clipped.gradient + mechanism.noise_standard_deviation * noise.gradient).astype(np.float32)
    assert np.array_equal(privatise(clipped, mechanism, noise).gradient, wanted)
    assert np.unique(noise.gradient).size == 1000
    assert (noise.gradient != noise.gradient.astype(np.float32)).mean() > 0.99


def test_pitfall_11_nothing_that_was_measured_leaves_unless_it_was_noised_and_accounted(
    unit_job: MakeJob, tmp_path: Path
) -> None:
    header = Home(unit_job(ROWS_OF), tmp_path).answer().header
    plan = {"site", "run_id", "round", "job_sha256", "base_sha256", "event"}
    ledger = {"charges", "head", "witnessed"}
    public = plan | ledger | {"update_sha256", "signature"}
    assert {name for name, value in header.model_dump().items() if value is not None} <= public
    asked = unit_job(ROWS_OF, privacy={"metrics": "noised", "clipping": "adaptive"})
    header = Home(asked, tmp_path / "asked").answer().header
    assert header.train_loss is not None
    assert header.clipping_norm not in {None, asked.privacy.clipping_norm}
    mechanism = mechanism_of(asked)
    assert mechanism.gradient_noise_multiplier > mechanism.noise_multiplier == header.event["noise_multiplier"]


def test_pitfall_12_an_average_needs_no_count_and_no_site_sends_one(unit_job: MakeJob, tmp_path: Path) -> None:
    large, small = (unit_job(rows_of) for rows_of in ({f"p{i}": 8 for i in range(12)}, {"p0": 1}))
    headers = [Home(job, tmp_path / str(i)).answer().header.model_dump() for i, job in enumerate((large, small))]
    for header in headers:
        header["head"] = header["head"]["seq"]
        del header["job_sha256"], header["update_sha256"], header["signature"]
    assert headers[0] == headers[1]
    layout = Layout({"t": (4,)}, ("t",))
    with Spool(tmp_path / "spool", {2: layout}, {2: {"t": np.zeros(4, dtype=np.float32)}}, {}) as updates:
        for site, value in (("large", 3.0), ("small", 1.0)):
            updates.add(site, 2, np.full(4, value, dtype=np.float32))
        assert weighted_mean(updates, "t").tolist() == [2.0] * 4


@pytest.mark.parametrize("units", [0, 7, 40])
def test_pitfall_13_the_share_that_moves_the_norm_has_noise_of_a_public_size(units: int) -> None:
    mechanism = Mechanism(
        sampling_probability=1.0, expected_batch_size=20, clipping_norm=1.0, noise_multiplier=0.5, adaptive=True
    )
    shares = [step(Parts(), mechanism, zeros(units, 4), secure_stream()).below or 0.0 for _ in range(400)]
    scaled = ((np.array(shares) - 0.5) * 40 - units) / mechanism.side_noise_multiplier
    assert ALPHA < stats.chi2.cdf(float(np.square(scaled).sum()), 400) < 1 - ALPHA
    joint = mechanism.gradient_noise_multiplier**-2 + mechanism.side_noise_multiplier**-2
    assert joint**-0.5 == pytest.approx(mechanism.noise_multiplier, rel=1e-12)


def test_pitfall_14_every_trial_of_a_setting_is_in_the_ledger(unit_job: MakeJob, tmp_path: Path) -> None:
    job = unit_job(ROWS_OF, privacy={"noise_multiplier": 2.0})
    site = Home(job, tmp_path)
    for run_id in ("rate-0.1", "rate-1", "rate-10"):
        site.answer(run_id)
    dataset = site.home.policy.dataset[0].id
    events = site.home.ledger.events(dataset)
    assert [event.to_dict() for event in events] == [mechanism_of(job).event(1).to_dict()] * 3
    assert epsilon(events, 1e-3) > epsilon(events[:1], 1e-3)


def test_pitfall_15_only_what_is_clipped_can_be_trained_and_no_module_mixes_people(job: Job) -> None:
    trainer = trainer_of(job)
    trained = {name for name, p in trainer.network.adapted.named_parameters() if p.requires_grad}
    assert len(trained) == len(trainer.layout.trained)
    assert all(".lora_B." in name for name in trained)
    trainer.network.inner.model.norm = torch.nn.BatchNorm1d(32).train()
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(trainer.network)
    assert caught.value.code == "E-LORA-MIX"


def test_pitfall_16_no_two_rows_share_a_sequence(job: Job) -> None:
    records, tokenizer = read_records(Path(str(job.data.train))), load_tokenizer(locate(job))
    data = prepare(records, tokenizer, job)
    alone = [prepare([record], tokenizer, job).examples[0] for record in records]
    assert data.examples == alone
    assert [record.columns["person"] for record in records] == [f"p{owner}" for owner in data.owners]


def test_pitfall_17_an_examples_weight_does_not_depend_on_the_tokens_of_others(job: Job) -> None:
    trainer, data = trainer_of(job), data_of(job)
    first, *others = data.examples
    short = replace(first, ids=first.ids[-4:], start=2)
    alone = trainer.network.losses([short], None).detach()
    beside = trainer.network.losses([short, *others], None).detach()
    assert float(alone[0]) == pytest.approx(float(beside[0]), rel=1e-5)


def test_pitfall_18_a_checkpoint_holds_the_adapter_and_no_state_of_optimiser_or_noise(job: Job, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    trainer = trainer_of(job)
    train(trainer, data_of(job), mechanism_of(job))
    arrays, run = read(trainer.network.adapted), create_run(tmp_path, job, dump_toml(job).encode())
    save_checkpoint(run, Progress(1, arrays, 1.0), arrays, {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0})
    folder = next(run.checkpoints.iterdir())
    numbers = {"adapter_model.safetensors", "state.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*numbers, "adapter_config.json", "README.md", "progress.json"}
    assert all(set(load_file(folder / name)) == set(trainer.layout.shapes) for name in numbers)
    held = {name for name in vars(trainer) if "optim" in name or "noise" in name or "stream" in name}
    assert held == set()


def test_pitfall_19_words_labels_and_ranks_are_public_before_any_record_is_read(
    make_job: MakeJob, tiny_encoder: Path, tmp_path: Path
) -> None:
    classify = {"kind": "classify", "labels": ["cardio", "derma"]}
    job = make_job(model={"base": str(tiny_encoder)}, task=classify, lora={"target_modules": ["query"]})
    tokenizer = load_tokenizer(locate(job))
    words = len(tokenizer)
    records = read_records(Path(str(job.data.train)))
    with pytest.raises(DataError) as caught:
        prepare(records, tokenizer, job)
    assert caught.value.code == "E-DATA-LABEL", "a third label is in the data: it is refused, not learnt"
    known = job.replace(task={"labels": ["cardio", "derma", "pulmo"]})
    prepare(records, tokenizer, known)
    assert len(tokenizer) == words
    with pytest.raises(ValueError, match="frozen"):
        job.lora.r = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert job.replace(lora={"r": 4}).sha256() != job.sha256()


def test_pitfall_20_one_norm_over_all_tensors_is_the_sensitivity() -> None:
    mechanism = Mechanism(sampling_probability=1.0, expected_batch_size=1, clipping_norm=0.7, noise_multiplier=1.0)
    tensors = {name: torch.full((1, 3, 3), 1e3) for name in "abcdefghi"}
    clipped: ClippedSum = clipped_sum(PerUnit(tensors, torch.zeros(1), torch.ones(1)), mechanism)
    assert 0.699 < np.linalg.norm(clipped.gradient) <= mechanism.sensitivity == 0.7
    assert mechanism.noise_standard_deviation == mechanism.noise_multiplier * mechanism.sensitivity
