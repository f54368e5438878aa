"""Plans and answers through Flower's records: bit for bit, and nothing a site sends ends a round."""

import io
import json
import zipfile

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotune.shared.adapter import flat_sha256
from cotune.shared.chain import SignedHead
from cotune.shared.codec import encode
from cotune.shared.errors import ConnectionFailed, RefusedError
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan, cotune_version
from cotune.shared.update import AdapterUpdate, SiteFailure, UpdateHeader, payload_sha256
from cotune.shared.wire import (
    MAX_WORDS,
    adapter_to_record,
    answer_from_records,
    answer_to_records,
    ledger_from_records,
    ledger_to_records,
    plan_from_records,
    plan_to_records,
    query_from_records,
    request_to_records,
    signature_from_records,
    signature_to_records,
)

SITE = "site-1"
HEAD = SignedHead(
    site=SITE, seq=7, sha256="0" * 64, public_key="ssh-ed25519 " + "A" * 68, signature="the witness checks it"
)
VALUES = np.array([0.0, -0.0, 1e-45, -1e-38, 3.4e38, 1 / 3, np.pi], dtype=np.float32)
PAYLOAD = encode(VALUES, "fp32", 0)


@pytest.fixture
def plan(make_job) -> RoundPlan:
    job = make_job(privacy={"delta": 1e-3, "noise_multiplier": 1 / 3})
    return RoundPlan(
        run_id="20260101-000000-aaaa-tiny",
        cotune=cotune_version(),
        job=job,
        site=SITE,
        round=2,
        rank=2,
        offset_rank=3,
        notice="round 1: its hash does not match",
        base_sha256=flat_sha256(VALUES),
        frozen_sha256="0" * 64,
        clipping_norm=1 / 7,
    )


def update(site: str = SITE) -> AdapterUpdate:
    header = UpdateHeader(
        site=site,
        run_id="20260101-000000-aaaa-tiny",
        round=2,
        job_sha256="1" * 64,
        base_sha256="2" * 64,
        update_sha256=payload_sha256(PAYLOAD),
        event={"kind": "dp-sgd", "sampling_probability": 1 / 3, "noise_multiplier": 0.1, "steps": 4},
        head=HEAD,
        witnessed=(HEAD.model_copy(update={"site": "site-2"}),),
        clipping_norm=1 / 7,
        train_loss=0.1,
        charges=2,
        signature="the coordinator checks it",
    )
    return AdapterUpdate(header, PAYLOAD)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def test_a_plan_arrives_as_it_was_sent_to_the_bit(plan: RoundPlan) -> None:
    received, array = plan_from_records(plan_to_records(plan, adapter_to_record(PAYLOAD)))
    assert received == plan
    assert received.job.sha256() == plan.job.sha256()
    assert same_bits(array, PAYLOAD)


def test_an_update_arrives_as_it_was_sent_to_the_bit() -> None:
    received = answer_from_records(answer_to_records(update()), SITE)
    assert isinstance(received, AdapterUpdate)
    assert received.header == update().header
    assert same_bits(received.payload, PAYLOAD)
    assert same_bits(received.delta("fp32", VALUES.size), VALUES)
    assert received.bytes == update().bytes


def test_a_ledger_is_asked_for_and_arrives_to_the_byte() -> None:
    request = LedgerRequest(run_id="20260101-000000-aaaa-tiny", site=SITE)
    assert query_from_records(request_to_records(request)) == request
    ledger = '{"seq": 1, "time": "é\u2028"}\n'.encode()
    assert ledger_from_records(ledger_to_records(ledger)) == ledger
    assert ledger_from_records(request_to_records(request)) is None
    assert ledger_from_records(RecordDict()) is None
    with pytest.raises(ConnectionFailed):
        query_from_records(ledger_to_records(ledger))


def test_a_claim_is_put_before_a_site_and_its_signature_comes_back() -> None:
    request = ClaimRequest(run_id="20260101-000000-aaaa-tiny", site=SITE, claim='{"a": "é\u2028"}\n')
    assert query_from_records(request_to_records(request)) == request
    assert signature_from_records(signature_to_records("-----BEGIN"), SITE) == "-----BEGIN"
    refused = SiteFailure(site="site-9", code="E-CLAIM-ENTRY", message="no\x1b[2J", exit_code=6)
    said = signature_from_records(answer_to_records(refused), SITE)
    assert isinstance(said, SiteFailure)
    assert (said.site, said.code, said.message.isprintable()) == (SITE, "E-CLAIM-ENTRY", True)
    for records in (RecordDict(), ledger_to_records(b"x"), request_to_records(request)):
        said = signature_from_records(records, SITE)
        assert isinstance(said, SiteFailure) and said.code == "E-WIRE"


def test_numbers_that_are_no_numbers_arrive_too_for_the_coordinator_to_refuse() -> None:
    sent = AdapterUpdate(update().header, np.array([np.nan, np.inf], dtype="<f4").view(np.uint8))
    received = answer_from_records(answer_to_records(sent), SITE)
    assert isinstance(received, AdapterUpdate)
    assert same_bits(received.payload, sent.payload)


def test_a_failure_arrives_under_the_name_of_the_site_that_was_asked() -> None:
    sent = SiteFailure(site="site-9", code="E-BUDGET", message="no", exit_code=6)
    received = answer_from_records(answer_to_records(sent), SITE)
    assert received == sent.model_copy(update={"site": SITE})


def test_a_strangers_words_become_one_short_line_that_steers_no_terminal() -> None:
    loud = SiteFailure(site=SITE, code="E-BUDGET", message="no\x1b[2J\r\nround 9: joined\u202e" + "!" * 5000)
    received = answer_from_records(answer_to_records(loud), SITE)
    assert isinstance(received, SiteFailure)
    assert received.message.startswith("no [2J  round 9: joined !!!")
    assert len(received.message) == MAX_WORDS
    assert received.message.isprintable()


@pytest.mark.parametrize("changes", [{"code": "e-lower"}, {"code": "E-\x1b"}, {"code": "E" * 41}, {"exit_code": 256}])
def test_a_failure_of_another_form_is_the_wires_own(changes: dict) -> None:
    said = {"site": SITE, "code": "E-BUDGET", "message": "no", "exit_code": 6, **changes}
    answer = answer_from_records(records({"kind": "failure", "json": json.dumps(said)}, None), SITE)
    assert isinstance(answer, SiteFailure)
    assert answer.code == "E-WIRE"


@pytest.mark.parametrize("version", ["0.0.9", None, ["0.1.0"], "9" * 100])
def test_a_plan_of_another_version_is_refused_by_name_before_its_settings_are_read(
    plan: RoundPlan, version: object
) -> None:
    header = {**json.loads(plan.model_dump_json(by_alias=True)), "cotune": version, "a later setting": True}
    with pytest.raises(RefusedError) as caught:
        plan_from_records(records({"kind": "plan", "json": json.dumps(header)}, Array(PAYLOAD)))
    assert (caught.value.code, caught.value.exit_code) == ("E-VERSION", 6)
    assert str(version)[:40] in caught.value.message
    assert cotune_version() in caught.value.message
    assert len(caught.value.message) < 120


def test_a_plan_of_this_version_with_a_setting_it_does_not_know_is_no_plan(plan: RoundPlan) -> None:
    header = {**json.loads(plan.model_dump_json(by_alias=True)), "a later setting": True}
    with pytest.raises(ConnectionFailed):
        plan_from_records(records({"kind": "plan", "json": json.dumps(header)}, Array(PAYLOAD)))


def test_an_update_in_the_name_of_another_site_is_the_failure_of_the_site_that_was_asked() -> None:
    received = answer_from_records(answer_to_records(update("site-2")), SITE)
    assert isinstance(received, SiteFailure)
    assert received.site == SITE


def test_a_plan_is_no_answer_and_an_answer_no_plan(plan: RoundPlan) -> None:
    assert isinstance(answer_from_records(plan_to_records(plan, adapter_to_record(PAYLOAD)), SITE), SiteFailure)
    with pytest.raises(ConnectionFailed) as caught:
        plan_from_records(answer_to_records(update()))
    assert (caught.value.code, caught.value.exit_code) == ("E-WIRE", 2)


def records(header: dict | None, array: Array | None) -> RecordDict:
    made = RecordDict()
    if header is not None:
        made["header"] = ConfigRecord(header)
    if array is not None:
        made["adapter"] = ArrayRecord({"adapter": array})
    return made


def raw(data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array("uint8", (28,), stype, data)


def npy(header: str) -> bytes:
    body = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def npz() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "x")
    return buffer.getvalue()


GOOD = {"kind": "update", "json": update().header.model_dump_json()}
DEEP = "[" * 100_000
MALFORMED = {
    "nothing at all": RecordDict(),
    "metrics only": RecordDict({"header": MetricRecord({"kind": 1.0})}),
    "no array": records(GOOD, None),
    "an empty array record": RecordDict({"header": ConfigRecord(GOOD), "adapter": ArrayRecord({})}),
    "no kind": records({"json": "{}"}, Array(PAYLOAD)),
    "another kind": records({**GOOD, "kind": "present"}, Array(PAYLOAD)),
    "a kind of bytes": records({**GOOD, "kind": b"update"}, Array(PAYLOAD)),
    "a header of numbers": records({"kind": "update", "json": [1, 2]}, Array(PAYLOAD)),
    "a header that is not JSON": records({"kind": "update", "json": "{"}, Array(PAYLOAD)),
    "a header that is a list": records({"kind": "update", "json": "[]"}, Array(PAYLOAD)),
    "a header nested too deeply": records({"kind": "update", "json": DEEP}, Array(PAYLOAD)),
    "a number with too many digits": records({"kind": "update", "json": "1" * 5000}, Array(PAYLOAD)),
    "a failure that is a number": records({"kind": "failure", "json": "3"}, None),
    "a float64 array": records(GOOD, Array(VALUES.astype(np.float64))),
    "a float32 array": records(GOOD, Array(VALUES)),
    "an array of signed bytes": records(GOOD, Array(PAYLOAD.view(np.int8))),
    "a matrix": records(GOOD, Array(PAYLOAD[None])),
    "a scalar": records(GOOD, Array(np.array(1, dtype=np.uint8))),
    "an array of words": records(GOOD, Array(np.array(["a"]))),
    "an empty array": records(GOOD, raw(b"")),
    "garbage for an array": records(GOOD, raw(b"garbage")),
    "half an array": records(GOOD, raw(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (28,), }") + b"12")),
    "an array too large for any memory": records(
        GOOD, raw(npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**15},), }}"))
    ),
    "a pickled array": records(GOOD, raw(npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + b"cos\n.")),
    "an archive for an array": records(GOOD, raw(npz())),
    "a broken archive for an array": records(GOOD, raw(b"PK\x03\x04")),
    "another serialisation": records(GOOD, raw(b"", "torch.tensor")),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_answer_becomes_the_sites_failure(kind: str) -> None:
    answer = answer_from_records(MALFORMED[kind], SITE)
    assert isinstance(answer, SiteFailure)
    assert (answer.site, answer.code) == (SITE, "E-WIRE")


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_plan_is_a_connection_error(kind: str) -> None:
    with pytest.raises(ConnectionFailed):
        plan_from_records(MALFORMED[kind])


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
REQUIRED = {name for name, field in UpdateHeader.model_fields.items() if field.is_required()}
fields = st.sampled_from([*UpdateHeader.model_fields, "extra"])
config_values = st.one_of(st.text(), st.binary(), st.integers(-9, 9), st.booleans(), st.lists(st.text(), max_size=2))
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(field=fields, value=json_values, drop=st.booleans())
def test_a_changed_header_is_an_update_of_this_version_or_a_failure(field: str, value: object, drop: bool) -> None:
    header = json.loads(GOOD["json"])
    if drop:
        header.pop(field, None)
    else:
        header[field] = value
    answer = answer_from_records(records({"kind": "update", "json": json.dumps(header)}, Array(PAYLOAD)), SITE)
    assert isinstance(answer, AdapterUpdate | SiteFailure)
    if drop and field in REQUIRED:
        assert isinstance(answer, SiteFailure)


@quick
@given(config=st.dictionaries(st.sampled_from(["kind", "json", "x"]), config_values), data=st.binary(max_size=200))
def test_any_records_are_an_update_or_a_failure(config: dict, data: bytes) -> None:
    assert isinstance(answer_from_records(records(config, raw(data)), SITE), SiteFailure)
    assert isinstance(answer_from_records(records(GOOD, raw(data)), SITE), SiteFailure)


@quick
@given(position=st.integers(0, 155), byte=st.integers(0, 255))
def test_one_wrong_byte_of_an_array_is_never_an_exception(position: int, byte: int) -> None:
    data = bytearray(Array(PAYLOAD).data)
    data[position % len(data)] = byte
    assert isinstance(answer_from_records(records(GOOD, raw(bytes(data))), SITE), AdapterUpdate | SiteFailure)
