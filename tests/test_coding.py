"""The coder on any symbols, any frequencies and any bytes: lossless, as long as predicted, and clear about files it cannot read."""

import hashlib
import io
import math
import os
import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.block import Config, Transformer
from tunebook.entropy import coding
from tunebook.entropy.coding import (
    HEADER,
    MAX_TOTAL,
    SPARE,
    Counts,
    Decoder,
    Encoder,
    FromLogits,
    Mixer,
    NGrams,
    compress,
    decode,
    decompress,
    encode,
    frequencies,
    name_of,
)
from tunebook.kit import data
from tunebook.kit.cli import ELSEWHERE, main

quick = settings(deadline=None, max_examples=60, derandomize=True)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
REAL = Path(os.environ.get("TUNEBOOK_DATA") or "/nonexistent").expanduser() / "tinyshakespeare"
FRAME = HEADER.size + 8


def python(code, **env):
    """Standard output of a fresh interpreter."""
    env = os.environ | {"PYTHONPATH": str(data.checkout())} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


class Fickle:
    """Other frequencies at every step, from a seed: some 1, some huge."""

    def __init__(self, seed, size, largest=MAX_TOTAL):
        self.rng, self.size, self.largest = random.Random(seed), size, largest
        self.update(0)

    def frequencies(self):
        return self.told

    def update(self, symbol):
        self.told = [1 + int(self.rng.random() ** 9 * (self.largest // self.size - 1)) for _ in range(self.size)]


def with_big_integers(message, model):
    """The same code by one integer that grows without end: no window, no carry."""
    low, wide, left = 0, 1 << coding.WINDOW, 0
    for s in message:
        ends = list(accumulate(f := model.frequencies()))
        step = wide // ends[-1]
        low, wide = low + step * (ends[s] - f[s]), step * f[s]
        while wide < 1 << SPARE:
            low, wide, left = low << 8, wide << 8, left + 1
        model.update(s)
    return (-(-low >> SPARE)).to_bytes(left + 1, "big")


# The coder

@quick
@given(data=st.data(), size=st.integers(1, 300), seed=st.integers(0, 2**31), largest=st.sampled_from([300, 2**16, MAX_TOTAL]))
def test_any_symbols_any_frequencies(data, size, seed, largest):
    message = data.draw(st.lists(st.integers(0, size - 1), max_size=120))
    code, bits = encode(message, Fickle(seed, size, largest))
    assert list(decode(code, len(message), Fickle(seed, size, largest))) == message
    assert code == with_big_integers(message, Fickle(seed, size, largest))
    slack = 1 - len(message) * math.log2(1 - largest / 2**SPARE) / 8
    assert -1e-9 <= len(code) - bits / 8 <= slack + 1e-9


@pytest.mark.parametrize("symbols", [5, 30, 200])
def test_a_carry_runs_through_all_bytes(symbols):
    """Thirds that keep one half inside them write 7f ff ff ...; the last symbol lies above it and turns all of that into 80 00 00 ..."""
    message, half, wide = [], 1 << coding.WINDOW - 1, 1 << coding.WINDOW
    while len(message) < symbols or half > 2 * (wide // 3):
        step = wide // 3
        message.append(min(half // step, 2))
        half, wide = half - step * message[-1], step
        while wide < 1 << SPARE:
            half, wide = half << 8, wide << 8
    message.append(2)
    thirds = Fickle(0, 3, 3)
    code, _ = encode(message, thirds)
    assert list(decode(code, len(message), thirds)) == message
    assert code == with_big_integers(message, thirds)
    assert code.startswith(b"\x80" + bytes(len(message) // 8))


def test_nothing_and_certainty_cost_one_byte():
    assert encode([], Counts(2)) == (b"\0", 0.0)
    code, bits = encode([0] * 1000, Fickle(0, 1))
    assert (len(code), bits) == (1, 0.0)
    assert list(decode(b"", 3, Counts(2))) == [0, 0, 0]


@quick
@given(noise=st.binary(max_size=40), seed=st.integers(0, 2**31))
def test_noise_is_read_as_symbols_or_refused(noise, seed):
    try:
        got = list(decode(noise, 100, Fickle(seed, 7)))
    except ValueError as e:
        assert "no code of this model" in str(e)
    else:
        assert len(got) == 100 and set(got) <= set(range(7))


def test_a_number_in_no_part_is_refused():
    with pytest.raises(ValueError, match="no code of this model: the number lies in no symbol's part"):
        Decoder(b"\xff" * 7).slot(3)


@pytest.mark.parametrize(("start", "width", "total"), [(0, 0, 4), (0, -1, 4), (0, 5, 4), (0, 1, MAX_TOTAL + 1), (0, 0, 0)])
def test_impossible_frequencies(start, width, total):
    with pytest.raises(ValueError, match=r"expected a frequency from 1 to .* and a total up to 2\^32, got"):
        Encoder().narrow(start, width, total)


@pytest.mark.parametrize("symbol", [-1, 2, 256])
def test_unknown_symbols(symbol):
    with pytest.raises(ValueError, match=f"expected symbols from 0 to 1, got {symbol}"):
        encode([0, symbol], Counts(2))


# Models

@quick
@given(st.binary(max_size=300))
def test_counting_costs_the_closed_form(sample):
    fact = math.lgamma
    nats = fact(len(sample) + 256) - fact(256) - sum(fact(sample.count(s) + 1) for s in range(256))
    assert math.isclose(encode(sample, Counts(256))[1], nats / math.log(2), rel_tol=1e-9, abs_tol=1e-9)


@settings(quick, max_examples=40)
@given(st.one_of(st.binary(max_size=120), st.text(max_size=60).map(str.encode),
                 st.builds(lambda b, n: bytes([b]) * n, st.integers(0, 255), st.integers(0, 400))))
def test_any_bytes_come_back_as_long_as_predicted(content):
    for make in (NGrams, lambda: Counts(256)):
        file, bits = compress(content, make)
        assert decompress(file, make) == content
        assert -1e-9 <= len(file) - FRAME - bits / 8 <= 1.001


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 5000, bytes(range(256)) * 2, random.Random(0).randbytes(2000),
                                     b"\xc3(\xe2\x82\xff\xfe\0", "Grüße, 世界 🦉".encode() * 20, "Grüße".encode("utf-16")])
def test_awkward_contents(content):
    file, _ = compress(content)
    assert decompress(file) == content
    assert len(file) <= FRAME + 1 + 1.1 * len(content)


def test_the_integers_are_the_same_in_every_process():
    code = ("import hashlib\nfrom tunebook.entropy.coding import *\n"
            "print(name_of(NGrams())[0].hex(), hashlib.sha256(compress(b'the quick brown fox. ' * 20)[0]).hexdigest())")
    outs = {python(code, PYTHONHASHSEED=seed) for seed in ("0", "1")}
    here = hashlib.sha256(compress(b"the quick brown fox. " * 20)[0]).hexdigest()
    assert outs == {f"{name_of(NGrams())[0].hex()} {here}\n"}


def test_tables_are_the_real_functions():
    logistic = coding._logistic()
    for x in range(-coding.SURE, coding.SURE + 1):
        assert abs(logistic[x + coding.SURE] - min(max(65536 / (1 + math.exp(-x / 256)), 1), 65535)) <= 0.5 + 1e-6
    for zeros in range(coding.MOST + 1):
        for ones in range(coding.MOST + 1):
            evidence = coding._evidence()[zeros * (coding.MOST + 1) + ones]
            assert abs(evidence - 256 * math.log((ones + 0.4) / (zeros + 0.4))) <= 1


def test_the_mixer_follows_the_gradient_of_cross_entropy():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-2000, 2000, (50, 4), generator=g)
    y = torch.randint(2, (50,), generator=g)
    mixer, w = Mixer(4), torch.full((4,), 0.3, dtype=torch.float64)
    for evidence, bit in zip(x.tolist(), y.tolist()):
        p = mixer.predict(evidence, 0) / 65536
        w.requires_grad_()
        odds = (w * torch.tensor(evidence).double() / 256).sum()
        assert abs(p - odds.sigmoid().item()) < 2e-3
        grad, = torch.autograd.grad(F.binary_cross_entropy_with_logits(odds, torch.tensor(float(bit)).double()), w)
        mixer.update(bit)
        w = (w - 256 * 2**-15 * grad).detach()
        assert max(abs(a / 65536 - b) for a, b in zip(mixer.weights[0], w.tolist())) < 2e-3


# Any next-token model

@quick
@given(seed=st.integers(0, 2**31), size=st.integers(1, 2000), scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), device=st.sampled_from(DEVICES))
def test_frequencies_are_softmax_for_every_dtype(seed, size, scale, dtype, device):
    x = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.clamp(-6e4, 6e4).to(dtype).to(device)
    f = frequencies(x)
    assert len(f) == size and min(f) >= 1 and sum(f) <= MAX_TOTAL and all(type(v) is int for v in f)
    bits = -(torch.tensor(f).double() / sum(f)).log2()
    loss = -x.double().log_softmax(-1).cpu() / math.log(2)
    assert (bits - loss).max() <= math.log2(MAX_TOTAL / (MAX_TOTAL - size)) + 1e-10 * (1 + scale)


def test_impossible_and_bad_logits():
    assert frequencies(torch.tensor([0.0, -math.inf])) == [MAX_TOTAL - 1, 1]
    for bad in (torch.tensor([0.0, math.nan]), torch.tensor([math.inf, 0.0]), torch.zeros(2, 2), torch.full((2,), -math.inf)):
        with pytest.raises(ValueError, match=r"expected finite logits \(V,\), got"):
            frequencies(bad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transformer_writes_what_its_loss_predicts(device, dtype):
    torch.manual_seed(0)
    net = Transformer(Config(vocab=256, width=16, layers=1, heads=2, length=64)).to(device, dtype).eval()
    for p in net.parameters():
        p.data.mul_(3)
    content = b"a causal model reads from left to right"

    @torch.no_grad()
    def predict(past):
        return net(torch.tensor([[10, *past]], device=device)).logits[0, -1]

    file, bits = compress(content, lambda: FromLogits(predict))
    assert decompress(file, lambda: FromLogits(predict)) == content
    tokens = torch.tensor([[10, *content]], device=device)
    loss = F.cross_entropy(net(tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="sum").item() / math.log(2)
    assert abs(bits - loss) <= 1e-3 * loss and -1e-9 <= len(file) - FRAME - bits / 8 <= 1.01


def test_other_weights_are_another_model():
    makes = []
    for seed in range(2):
        x = torch.randn(256, generator=torch.Generator().manual_seed(seed))
        makes.append(lambda x=x: FromLogits(lambda past: x))
    file, _ = compress(b"hello", makes[0])
    with pytest.raises(ValueError, match="written with model [0-9a-f]{16}, this is [0-9a-f]{16}"):
        decompress(file, makes[1])


def test_a_model_that_changes_after_its_name_was_taken_is_caught_by_the_checksum():
    def make(late):
        return lambda: FromLogits(lambda past: torch.zeros(256) if len(past) <= len(coding.PROBE) else late.double())
    content = b"What is well expected is soon said; this goes on after the sentence that names a model, and on."
    a, b = torch.zeros(256), torch.zeros(256).index_fill(0, torch.tensor([101]), 3.0)
    file, _ = compress(content, make(a))
    with pytest.raises(ValueError, match="another checksum: the model's numbers differ|no code of this model"):
        decompress(file, make(b))


def test_models_of_other_sizes():
    with pytest.raises(ValueError, match="expected a model of 2 symbols .* or 256 .*, got 3"):
        compress(b"abc", lambda: Counts(3))


# Files that cannot be read

FILE = compress(b"to be, or not to be, that is the question")[0]


@pytest.mark.parametrize("at", range(len(FILE)))
def test_a_flipped_bit_is_refused(at):
    for bit in (1, 128):
        with pytest.raises(ValueError, match="not a file of tunebook compress|damaged or cut short"):
            decompress(FILE[:at] + bytes([FILE[at] ^ bit]) + FILE[at + 1 :])


@pytest.mark.parametrize("length", range(len(FILE)))
def test_a_file_cut_short_is_refused(length):
    with pytest.raises(ValueError, match="not a file of tunebook compress|damaged or cut short"):
        decompress(FILE[:length])


@quick
@given(st.binary(max_size=80))
def test_foreign_files_are_refused(noise):
    for foreign in (noise, coding.MAGIC + noise, FILE + noise[:1] + b"x"):
        with pytest.raises(ValueError, match="not a file of tunebook compress|damaged or cut short"):
            decompress(foreign)


# The commands

@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "verse.txt").write_bytes(b"Full fathom five thy father lies\n" * 3)
    return tmp_path


def names(folder): return sorted(p.name for p in folder.iterdir())


def refused(capsys, *argv):
    """The one line a command leaves when it does nothing."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tunebook: "), (out, err)
    return err


def test_there_and_back(there, capsys):
    assert main(["compress", "verse.txt"]) == 0
    told = capsys.readouterr().out
    size = (there / "verse.txt.tbc").stat().st_size
    assert f"verse.txt.tbc: {size} bytes, " in told and "bits per byte; the loss predicted" in told and told.count("\n") == 1
    assert main(["decompress", "verse.txt.tbc", "-o", "again/verse.txt"]) == 0
    assert (there / "again/verse.txt").read_bytes() == (there / "verse.txt").read_bytes()
    assert names(there) == ["again", "verse.txt", "verse.txt.tbc"] and names(there / "again") == ["verse.txt"]


def test_an_empty_file(there, capsys):
    (there / "empty").touch()
    assert main(["compress", "empty"]) == main(["decompress", "empty.tbc", "-o", "back"]) == 0
    assert (there / "back").read_bytes() == b""


def test_what_exists_is_kept_unless_forced(there, capsys):
    (there / "verse.txt.tbc").write_bytes(b"precious")
    assert "verse.txt.tbc exists" in refused(capsys, "compress", "verse.txt")
    assert (there / "verse.txt.tbc").read_bytes() == b"precious"
    assert main(["compress", "verse.txt", "--force"]) == 0
    assert "verse.txt exists" in refused(capsys, "decompress", "verse.txt.tbc")
    assert main(["decompress", "verse.txt.tbc", "--force"]) == 0


def test_sources_that_cannot_be_read(there, capsys):
    assert "cannot read nowhere (No such file" in refused(capsys, "compress", "nowhere")
    (there / "folder").mkdir()
    assert "cannot read folder (Is a directory)" in refused(capsys, "compress", "folder")
    assert "does not end with .tbc" in refused(capsys, "decompress", "verse.txt")
    assert "not a file of tunebook compress" in refused(capsys, "decompress", "verse.txt", "-o", "out")
    (there / "bad.tbc").write_bytes(FILE[:-3])
    assert "bad.tbc: damaged or cut short" in refused(capsys, "decompress", "bad.tbc")
    assert names(there) == ["bad.tbc", "folder", "verse.txt"]


def test_targets_that_cannot_be_written(there, capsys, monkeypatch):
    assert "cannot write verse.txt/out (" in refused(capsys, "compress", "verse.txt", "-o", "verse.txt/out")
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    assert "cannot write verse.txt.tbc (No space left on device)" in refused(capsys, "compress", "verse.txt")
    assert names(there) == ["verse.txt"]


def test_an_interrupt_leaves_nothing(there, capsys, monkeypatch):
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(coding, "_bar", stop)
    assert main(["compress", "verse.txt"]) == 130
    assert capsys.readouterr().err == "tunebook: interrupted\n" and names(there) == ["verse.txt"]


def test_the_bar_shows_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(coding._bar(iter(range(1000)), 1000)) == list(range(1000))
        assert list(coding._bar(iter(()), 0)) == []
        assert ("50%" in stream.getvalue() and stream.getvalue().endswith("\r\033[K")) is shown
        assert shown or not stream.getvalue()


def test_the_commands_do_not_load_torch(there):
    code = ("import sys\nfrom tunebook.kit.cli import main\nassert main(['compress', 'verse.txt']) == 0\n"
            "print(sorted({'torch', 'numpy', 'rich', 'tunebook.entropy.coding'} & set(sys.modules)))")
    assert python(code).splitlines()[-1] == "['tunebook.entropy.coding']"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_commands_of_other_parts_exist_and_their_help_loads_no_part(name, capsys):
    module, _, function = ELSEWHERE[name].where.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    code = (f"import contextlib, sys\nfrom tunebook.kit.cli import main\nwith contextlib.suppress(SystemExit): main(['{name}', '--help'])\n"
            f"print(sorted({{'torch', '{module}'}} & set(sys.modules)))")
    out = python(code)
    assert "example: tunebook" in out and out.splitlines()[-1] == "[]"


# A real text

@pytest.mark.skipif(not REAL.is_dir(), reason="TUNEBOOK_DATA names no folder that holds tinyshakespeare/")
def test_a_part_of_shakespeare(there, capsys):
    _, splits = data.locate("tinyshakespeare")
    whole = "".join(splits[s][0]["text"] for s in data.SPLITS).encode()
    assert whole == (REAL / "input.txt").read_bytes() and len(whole) == 1_115_394
    part = whole[500_000:540_000]
    (there / "play.txt").write_bytes(part)
    assert main(["compress", "play.txt"]) == main(["decompress", "play.txt.tbc", "-o", "back.txt"]) == 0
    assert (there / "back.txt").read_bytes() == part
    predicted = float(capsys.readouterr().out.split("predicted ")[1].split(" ")[0].replace(",", ""))
    written = (there / "play.txt.tbc").stat().st_size
    assert abs(written - predicted) <= 1 + 0.001 * predicted and 8 * written / len(part) < 2.8
