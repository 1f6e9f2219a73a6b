"""TFRecord framing, and tf.train.Example: what is right is read exactly, what is damaged is refused, nothing costs more than its size."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit import tfds
from vla_oft.data.example import MAX_FEATURES, Strings, decode_varints, parse_example
from vla_oft.data.tfrecord import masked_crc, read_records

KEYS = st.text(max_size=8)
INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9).map(lambda values: np.array(values, np.float32))
INTEGERS = st.lists(INT64, min_size=1, max_size=9).map(lambda values: np.array(values, np.int64))
TEXTS = st.lists(st.binary(max_size=300), min_size=1, max_size=5)


def read(path):
    return [(record.number, bytes(record.data)) for record in read_records(path)]


def strings(values, data):
    assert isinstance(values, Strings)
    return [data[at : at + size] for at, size in zip(values.starts.tolist(), values.sizes.tolist(), strict=True)]


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(tfds.frame(data) for data in (b"first", b"", b"the third" * 9)))
    return path


def test_the_checksum_is_the_published_one():
    # CRC-32C of 32 zero bytes (RFC 3720, B.4) is 8a9136aa; masked: rotated right by 15, plus a282ead8
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def test_records_come_in_order(shard, tmp_path):
    assert read(shard) == [(0, b"first"), (1, b""), (2, b"the third" * 9)]
    offsets = [record.offset for record in read_records(shard)]
    assert offsets == [12, 12 + 5 + 16, 12 + 5 + 32]
    (tmp_path / "empty").touch()
    assert read(tmp_path / "empty") == []


def test_a_file_cut_anywhere_loses_only_what_is_cut(shard, tmp_path):
    whole, records = shard.read_bytes(), read(shard)
    ends = [5 + 16, 5 + 32, len(whole)]
    for length in range(1, len(whole)):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:length])
        lost: list[str] = []
        kept = [(record.number, bytes(record.data)) for record in read_records(cut, lost.append)]
        assert kept == records[: sum(end <= length for end in ends)]
        assert len(lost) == (length not in ends)
        if lost:
            assert f"record {len(kept)} at byte {([0, *ends])[len(kept)]}" in lost[0]
            with pytest.raises(ValueError, match=r"cut: record \d at byte \d+: .*copy the file again"):
                read(cut)


def test_no_changed_byte_goes_unnoticed(shard, tmp_path):
    whole, records = shard.read_bytes(), read(shard)
    changed = tmp_path / "changed"
    for place in range(5 + 32 + 20):
        data = bytearray(whole)
        data[place] ^= 1 + place % 255
        changed.write_bytes(data)
        lost: list[str] = []
        kept = [(record.number, bytes(record.data)) for record in read_records(changed, lost.append)]
        assert len(lost) == 1 and len(kept) < 3 and all(record in records for record in kept)


def test_damaged_data_cost_one_record_a_damaged_length_all_that_follow(shard):
    data = bytearray(shard.read_bytes())
    data[14] ^= 1  # in "first"
    shard.write_bytes(data)
    lost: list[str] = []
    assert [record.number for record in read_records(shard, lost.append)] == [1, 2]
    assert lost == ["record 0 at byte 0: the checksum of its 5 bytes is wrong"]
    data[5 + 16] ^= 1  # the length of the second
    shard.write_bytes(data)
    lost.clear()
    assert [record.number for record in read_records(shard, lost.append)] == []
    assert len(lost) == 2 and "record 1 at byte 21: the checksum of its length is wrong; it and all after it are lost" in lost[1]


@pytest.mark.parametrize("length", [2**63, 2**40, 2**31 - 1, 1000])
def test_a_length_beyond_the_file_is_never_allocated(tmp_path, length):
    head = struct.pack("<Q", length)
    path = tmp_path / "huge"
    path.write_bytes(head + struct.pack("<I", masked_crc(head)) + bytes(100))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"huge: record 0 at byte 0.*{length}|needs {length + 4} more bytes"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*cannot be read"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.lists(st.binary(max_size=40), max_size=3))
def test_random_files_are_refused_or_read(tmp_path_factory, noise, records):
    path = tmp_path_factory.mktemp("random") / "x"
    path.write_bytes(b"".join(map(tfds.frame, records)) + noise)
    lost: list[str] = []
    kept = [bytes(record.data) for record in read_records(path, lost.append)]
    assert kept[: len(records)] == records and len(lost) <= 1 + len(noise) // 16
    path.unlink()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, FLOATS | INTEGERS | TEXTS, max_size=6))
def test_examples_round_trip(features):
    data = tfds.example(features)
    found = parse_example(data)
    assert found.keys() == features.keys()
    for name, wanted in features.items():
        if isinstance(wanted, list):
            assert strings(found[name], data) == wanted
        else:
            np.testing.assert_array_equal(found[name], wanted)
            assert found[name].dtype == wanted.dtype


@given(st.lists(INT64, max_size=30))
def test_integers_of_every_size(values):
    packed = b"".join(map(tfds.varint, values))
    np.testing.assert_array_equal(decode_varints(packed), np.array(values, np.int64))


def test_long_lists_of_integers_cross_block_borders(rng):
    values = rng.integers(-(2**62), 2**62, 40_000) >> rng.integers(0, 62, 40_000)
    packed = b"".join(tfds.varint(int(value)) for value in values)
    assert len(packed) > 3 * 65_536
    np.testing.assert_array_equal(decode_varints(packed), values)


def test_numbers_one_by_one_and_in_pieces_are_one_list():
    floats = b"".join(b"\x0d" + struct.pack("<f", value) for value in (1.5, 2.5)) + tfds.field(1, struct.pack("<2f", 3.5, 4.5))
    integers = b"\x08\x05" + tfds.field(1, tfds.varint(-1) + tfds.varint(300)) + b"\x08" + tfds.varint(2**40)
    data = tfds.example({"floats": tfds.field(2, floats), "integers": tfds.field(3, integers), "none": b""})
    found = parse_example(data)
    assert found["floats"].tolist() == [1.5, 2.5, 3.5, 4.5]
    assert found["integers"].tolist() == [5, -1, 300, 2**40]
    assert found["none"] is None


def test_unknown_fields_are_skipped_and_the_last_duplicate_counts():
    unknown = tfds.field(9, b"junk") + b"\x50\x96\x01" + b"\x5d" + bytes(4) + b"\x59" + bytes(8)

    def entry(name, value):
        return tfds.field(1, unknown + tfds.field(1, name) + unknown + tfds.field(2, unknown + value) + unknown)

    texts = tfds.field(1, unknown + tfds.field(1, b"text") + unknown + tfds.field(1, b"") + unknown)
    features = entry(b"a", tfds.feature([b"old"])) + entry(b"b", texts) + unknown + entry(b"a", tfds.feature(np.array([1.5])))
    more = entry(b"b", tfds.feature([b"lost"]) + tfds.feature(np.array([7])))
    data = unknown + tfds.field(1, features) + unknown
    found = parse_example(data)
    assert found["a"].tolist() == [1.5] and strings(found["b"], data) == [b"text", b""]
    found = parse_example(data + tfds.field(1, more))
    assert found["a"].tolist() == [1.5] and found["b"].tolist() == [7]


def many(*parts):
    return st.lists(st.one_of(*parts), max_size=4).map(b"".join)


def fields(number, data):
    return data.map(lambda data: tfds.field(number, data))


def tagged(numbers, wire, data):
    return st.builds(lambda number, data: tfds.varint(number << 3 | wire) + data, st.sampled_from(numbers), data)


FOUR, VARINTS = st.binary(min_size=4, max_size=4), INT64.map(tfds.varint)
UNKNOWN = st.one_of(tagged([4, 1 << 20], 0, VARINTS), tagged([1, 4], 1, FOUR.map(lambda four: 2 * four)), fields(4, st.binary(max_size=4)))
BYTES_LIST = many(fields(1, st.binary(max_size=4)), tagged([1], 5, FOUR), UNKNOWN)
FLOAT_LIST = many(fields(1, many(FOUR)), tagged([1], 5, FOUR), UNKNOWN, tagged([1], 0, VARINTS))
INT64_LIST = many(fields(1, many(VARINTS, st.binary(max_size=3))), tagged([1], 0, VARINTS), UNKNOWN, tagged([1], 5, FOUR))
LISTS = [fields(1, BYTES_LIST), fields(2, FLOAT_LIST), fields(3, INT64_LIST)]
# No unknown fields directly in an entry: protobuf's own libraries disagree about them.
ENTRY = many(fields(1, st.sampled_from([b"a", b"b", b"\xff"])), fields(2, many(*LISTS, UNKNOWN)))
EXAMPLE = many(fields(1, many(fields(1, ENTRY), fields(1, ENTRY), UNKNOWN)), UNKNOWN, st.binary(max_size=1))


@settings(max_examples=100, deadline=None)
@given(EXAMPLE)
@case(tfds.example({"": tfds.field(3, tfds.field(1, b"\xff" * 10 + b"\x01")) + tfds.field(1, b"")}))
def test_whatever_is_accepted_means_what_protobuf_says(data):
    message = protobuf_example()
    try:
        found = parse_example(data)
    except ValueError as error:
        if "wire type" not in str(error):  # groups, which nothing writes any more
            with pytest.raises(Exception, match="."):
                message.ParseFromString(data)
        return
    message.ParseFromString(data)
    assert found.keys() == set(message.features.feature)
    for name, values in found.items():
        wanted = message.features.feature[name]
        kind = wanted.WhichOneof("kind")
        if kind is None:
            assert values is None
        elif kind == "bytes_list":
            assert strings(values, data) == list(wanted.bytes_list.value)
        else:
            np.testing.assert_array_equal(values, np.array(getattr(wanted, kind).value, values.dtype))


VALID = tfds.example({"a/b": [b"xy" * 80, b""], "c": np.arange(5.0), "d": np.array([1, -1, 300]), "e": np.ones(9, bool)})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(VALID)))
@case([(1, 255)], 0)
def test_changed_examples_raise_nothing_but_valueerror(changes, cut):
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    for damaged in (bytes(data), VALID[:cut]):
        try:
            found = parse_example(damaged)
        except ValueError:
            continue
        for values in found.values():
            if isinstance(values, Strings):
                assert all(0 <= at <= at + size <= len(damaged) for at, size in zip(*values, strict=True))


NASTY = {  # what a careless parser pays dearly for, of about so many bytes
    "booleans": lambda size: tfds.field(3, tfds.field(1, bytes(size))),
    "varying integers": lambda size: tfds.field(3, tfds.field(1, b"\x01\x80\x01" * (size // 3))),
    "empty texts": lambda size: tfds.field(1, b"\x0a\x00" * (size // 2)),
    "empty lists": lambda size: b"\x12\x00" * (size // 2),
    "kinds that change": lambda size: b"\x12\x00\x1a\x00" * (size // 4),
    "single floats": lambda size: tfds.field(2, b"\x0d\0\0\0\0" * (size // 5)),
    "single integers": lambda size: tfds.field(3, b"\x08\x01" * (size // 2)),
    "unknown fields": lambda size: tfds.field(1, b"\x10\x00" * (size // 2)),
}


@pytest.mark.parametrize("kind", NASTY)
def test_memory_and_time_stay_in_proportion_to_the_bytes(kind):
    data = tfds.example({"x": NASTY[kind](600_000 if kind in ("booleans", "varying integers") else 40_000)})
    tracemalloc.start()
    start = time.process_time()
    try:
        parse_example(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * len(data)
    assert time.process_time() - start < 5


def test_too_many_features_are_refused():
    data = tfds.field(1, b"".join(tfds.field(1, tfds.field(1, str(number).encode())) for number in range(MAX_FEATURES + 1)))
    with pytest.raises(ValueError, match="more than 4096 features"):
        parse_example(data)


def protobuf_example():
    """An empty tf.train.Example of Google's library, from the schema written out here."""
    pool_module = pytest.importorskip("google.protobuf.descriptor_pool")
    from google.protobuf import descriptor_pb2, message_factory

    pool = pool_module.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")

    def message(parent, name, *fields):
        made = parent.add(name=name)
        for number, (field_name, label, kind, of) in enumerate(fields, 1):
            made.field.add(name=field_name, number=number, label=label, type=kind, type_name=of and f".tf.{of}")
        return made

    repeated, optional, texts, floats, integers, nested, string = 3, 1, 12, 2, 3, 11, 9
    message(file.message_type, "BytesList", ("value", repeated, texts, None))
    message(file.message_type, "FloatList", ("value", repeated, floats, None))
    message(file.message_type, "Int64List", ("value", repeated, integers, None))
    kinds = [(f"{name}_list", optional, nested, f"{name.capitalize()}List") for name in ("bytes", "float", "int64")]
    feature = message(file.message_type, "Feature", *kinds)
    feature.oneof_decl.add(name="kind")
    for declared in feature.field:
        declared.oneof_index = 0
    features = message(file.message_type, "Features", ("feature", repeated, nested, "Features.FeatureEntry"))
    entry = message(features.nested_type, "FeatureEntry", ("key", optional, string, None), ("value", optional, nested, "Feature"))
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", optional, nested, "Features"))
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))()
