"""Lens: properties over drawn shapes, one clear error for each bad input, and the viewer in a real browser."""

import json
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.attention.block import Config, Transformer
from tunebook.attention.lens import (
    ablated,
    effects,
    head_means,
    head_scores,
    induction,
    logit_lens,
    previous,
    repeated,
    rollout,
    viewer,
)
from tunebook.kit.checks import close, same

sizes, seeds, dtypes = st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64])
quick = settings(deadline=None, max_examples=30, derandomize=True)
devices = pytest.mark.parametrize("device", ["cpu", "cuda"][: 1 + torch.cuda.is_available()])


def drawn(seed, L=2, B=2, H=3, T=5, dtype=torch.float64, keep=None):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(L, B, H, T, T, generator=g, dtype=torch.float64)
    if keep is not None:
        scores = scores.masked_fill(~keep[None, :, None, None, :], -torch.inf)
    return scores.softmax(-1).nan_to_num().to(dtype)


def small(**kw):
    torch.manual_seed(0)
    model = Transformer(Config(**{"vocab": 11, "width": 12, "layers": 2, "heads": 3, "length": 16} | kw)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


TOKENS = torch.tensor([[1, 4, 2, 1, 4, 7], [3, 3, 5, 0, 3, 9]])


@quick
@given(seed=seeds, L=sizes, B=sizes, H=sizes, T=sizes, dtype=dtypes, residual=st.sampled_from([0.1, 0.5, 1.0]))
def test_rollout_is_a_mean_of_tokens(seed, L, B, H, T, dtype, residual):
    w = drawn(seed, L, B, H, T, dtype)
    out = rollout(list(w), residual)
    assert out.shape == (B, T, T) and out.dtype == dtype and (out >= 0).all()
    close(out.sum(-1), torch.ones(B, T, dtype=dtype), terms=L * (3 * T + H + 8))
    if residual == 1.0:
        close(out, torch.eye(T, dtype=dtype).expand(B, T, T), terms=L * (3 * T + H + 8))
    mixed = [residual * torch.eye(T, dtype=dtype) + (1 - residual) * m.mean(1) for m in w]
    expected = mixed[0]
    for m in mixed[1:]:
        expected = m @ expected
    close(out, expected, terms=L * (4 * T + H + 16), scale=1.0)


@quick
@given(seed=seeds, T=st.integers(2, 6), pads=st.integers(1, 3))
def test_rollout_and_scores_see_no_padding(seed, T, pads):
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[1, max(1, T - pads):] = False
    w = drawn(seed, T=T, keep=keep)
    out = rollout(w)
    rows = keep[1].nonzero().flatten()
    assert not out[1][rows][:, ~keep[1]].any()
    blind = w.clone()
    blind[:, 1] = 0  # no key at all: a token keeps only itself
    close(rollout(blind)[1], torch.eye(T, dtype=torch.float64), terms=16)


@quick
@given(seed=seeds, B=sizes, T=st.integers(2, 8), V=st.integers(1, 5))
def test_targets_are_what_their_names_say(seed, B, T, V):
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    found, before = induction(tokens), previous(tokens)
    for b in range(B):
        for t in range(T):
            for s in range(T):
                assert bool(found[b, t, s]) == (1 <= s < t and tokens[b, s - 1] == tokens[b, t])
                assert bool(before[b, t, s]) == (s == t - 1)
    w = before.double()[None, :, None].expand(2, B, 3, T, T)
    same(head_scores(w, before), torch.ones(2, 3, dtype=torch.float64))
    assert not head_scores(w, before.roll(1, -1)).any() or T == 1


@quick
@given(seed=seeds, periods=st.lists(st.integers(1, 7), min_size=1, max_size=5), length=st.integers(1, 20))
def test_repeated_rows_start_over(seed, periods, length):
    rows = repeated(torch.tensor(periods), length, 7, torch.Generator().manual_seed(seed))
    assert rows.shape == (len(periods), length) and rows.min() >= 0 and rows.max() < 7
    for row, n in zip(rows, periods):
        assert len(set(row[:n].tolist())) == min(n, length)
        same(row[n:], row[:-n]) if length > n else None


@pytest.mark.parametrize("kw", [{}, {"pre": False, "causal": False}, {"kv_heads": 1, "rotary": 100.0, "norm": "rms", "gated": True}])
def test_an_ablated_head_is_one_without_its_columns(kw):
    model, twin = small(**kw), small(**kw)
    heads = [(0, 2), (1, 0), (1, 1)]
    with torch.no_grad():
        for layer, h in heads:
            twin.blocks[layer].attention.out.weight[:, 4 * h:4 * h + 4] = 0
        untouched = model(TOKENS).hidden
        with ablated(model, heads):
            off = model(TOKENS).hidden
        close(off, twin(TOKENS).hidden, terms=2000)
        assert float((off - untouched).abs().max()) > 1e-3
        same(model(TOKENS).hidden, untouched)


@torch.no_grad()
def test_means_replace_and_nothing_leaks():
    model = small()
    means = head_means(model, TOKENS)
    assert means.shape == (2, 3, 4)
    with ablated(model, [(1, 2)], means):
        fixed = head_means(model, TOKENS)
        with ablated(model, [(0, 0)]):  # nested: both at once
            assert not head_means(model, TOKENS)[0, 0].any()
    close(fixed[1, 2], means[1, 2], terms=24)
    keep = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    longer = torch.cat([TOKENS[1:, :3], TOKENS[1:, :3]])
    close(head_means(model, TOKENS[1:], keep[1:]), head_means(model, longer), terms=2000)
    with pytest.raises(RuntimeError, match="inside"), ablated(model, [(0, 1)]):
        raise RuntimeError("inside")
    assert not any(b.attention.out._forward_pre_hooks for b in model.blocks)


def test_ablation_lets_gradients_through():
    model = small()
    with ablated(model, [(0, 1)]):
        model(TOKENS).logits.sum().backward()
    g = model.blocks[0].attention.out.weight.grad
    assert not g[:, 4:8].any() and g[:, :4].any() and g[:, 8:].any()


@torch.no_grad()
def test_effects_and_lens():
    model = small()
    ran = model(TOKENS, keep=True)
    read = logit_lens(model, ran.states)
    assert read.shape == (3, 2, 6, 11)
    same(read[-1], ran.logits)
    assert float((read[1] - ran.logits).abs().max()) > 1e-3
    table = effects(model, lambda: model(TOKENS).logits.square().mean())
    with ablated(model, [(1, 1)]):
        off = model(TOKENS).logits.square().mean()
    assert table.shape == (2, 3) and abs(float(table[1, 1]) - float(off - ran.logits.square().mean())) < 1e-6


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_devices(device, dtype):
    model, tokens = small().to(device, dtype), TOKENS.to(device)
    with torch.no_grad():
        ran = model(tokens, keep=True)
        assert rollout(ran.weights).dtype == dtype and rollout(ran.weights).device.type == device
        assert logit_lens(model, ran.states).dtype == dtype
        assert head_scores(ran.weights, induction(tokens)).shape == (2, 3)
        with ablated(model, [(0, 0)], head_means(model, tokens)):
            assert model(tokens).hidden.dtype == dtype
    assert "layer 1, head 2" in viewer(list("abcdef"), ran.weights, 1)._repr_html_()


W = drawn(0)
BAD = {
    "no weights": (TypeError, "keep=True", lambda: rollout(None)),
    "layers of two runs": (ValueError, "one run", lambda: rollout([W[0], W[1, :1]])),
    "a missing dimension": (ValueError, "(B, H, T, S)", lambda: rollout(list(W[:, 0]))),
    "NaN": (ValueError, "0 to 1", lambda: rollout(W * torch.nan)),
    "infinity": (ValueError, "0 to 1", lambda: head_scores(W / 0, previous(TOKENS[:, :5]))),
    "scores": (ValueError, "softmax", lambda: viewer("abcde", W.log())),
    "rectangular maps": (ValueError, "without cache", lambda: rollout(W[..., :3])),
    "no residual": (ValueError, "0.5 is usual", lambda: rollout(W, 0.0)),
    "no head to read": (ValueError, "name no tokens", lambda: logit_lens(small(head="none"), [W[0]] * 3)),
    "states of another depth": (ValueError, "3 states, got 2", lambda: logit_lens(small(), [W[0]] * 2)),
    "states not kept": (ValueError, "keep=True", lambda: logit_lens(small(), None)),
    "no such head": (ValueError, "(1, 2), got (1, 3)", lambda: ablated(small(), [(1, 3)]).__enter__()),
    "no such layer": (ValueError, "count from 0", lambda: ablated(small(), [(-1, 0)]).__enter__()),
    "vectors of another size": (ValueError, "(2, 3, 4)", lambda: ablated(small(), [(0, 0)], torch.zeros(2, 3)).__enter__()),
    "an integer target": (ValueError, "boolean", lambda: head_scores(W, previous(TOKENS[:, :5]).int())),
    "a target of other tokens": (ValueError, "the same tokens", lambda: head_scores(W, previous(TOKENS))),
    "nothing repeats": (ValueError, "second time", lambda: head_scores(W, induction(torch.arange(10).view(2, 5)))),
    "a period beyond the tokens": (ValueError, "1 to the 4", lambda: repeated(torch.tensor([5]), 9, 4)),
    "too many tokens": (ValueError, "1 to 64 tokens", lambda: viewer("abcdef", W)),
    "no tokens": (ValueError, "1 to 64 tokens", lambda: viewer("", W)),
    "no such example": (ValueError, "example from 0 to 1", lambda: viewer("abcde", W, 2)),
    "no such start": (ValueError, "head from 0 to 2", lambda: viewer("abcde", W, start=(0, 3))),
    "maps without the mask": (ValueError, "padding mask", lambda: viewer("abc", W)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    error, words, call = BAD[case]
    with pytest.raises(error, match=re.escape(words)) as e:
        call()
    assert "\n" not in str(e.value) and len(str(e.value)) < 180


def test_the_viewer_is_small_self_contained_and_escaped():
    nasty = ["<script>alert(1)</script>", "a'b\"c", "&amp;", "new\nline", "</pre>", "", "ok", "x" * 40, "Ġthe", "</style>", "é", "日本"]
    w = torch.rand(6, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0)).pow(4)
    w = w / w.sum(-1, keepdim=True)
    page = viewer(nasty, w, start=(2, 5))._repr_html_()
    assert len(page.encode()) < 60_000 and page == viewer(nasty, w, start=(2, 5))._repr_html_()
    assert not re.search(r"<script|https?:|//|@import|\son\w+=|<link|<img|<iframe", re.sub(r"base64,[^)]*", "", page))
    assert page.count("</style>") == 1 and page.count("<pre") == page.count("</pre>") == 72 and page.count("url(") == 1
    assert page.count("<pre>") == 6 and page.count("<section>") == 1  # the rest is hidden where styles are stripped
    text = repr(viewer(nasty, w, start=(2, 5)))
    assert text.splitlines()[-1] == "layer 2, head 5" and "new\\nline" in text
    rows = [line[:36] for line in viewer(nasty, w).text(1, 3).splitlines()[:12]]
    got = torch.tensor([[float(row[i:i + 3].replace(">99", "100")) for i in range(0, 36, 3)] for row in rows])
    assert float((got - 100 * w[1, 0, 3]).abs().max()) <= 0.5 + 1e-4


def test_exact_zero_is_told_from_a_small_weight():
    w = torch.tensor([[1.0, 0.0], [0.999, 0.001]])[None, None, None]
    assert viewer("ab", w).text(0, 0).splitlines() == [">99  . a", ">99  0 b", "layer 0, head 0"]


def test_the_static_figure_has_alt_text(monkeypatch):
    from tunebook.kit import plots
    seen = []
    monkeypatch.setattr(plots, "show", lambda fig, alt: seen.append((fig.axes[0].get_title(loc="left") or fig.axes[0].get_title(), alt)))
    viewer("abcde", W).picture(1, 2)
    assert seen[0][0].startswith("Layer 1, head 2") and "The largest weight" in seen[0][1]


class Browser:
    """Chromium, driven through its own debugging protocol."""

    def __init__(self, folder):
        websocket = pytest.importorskip("websocket", reason="websocket-client, which comes with jupyter, is not installed")
        binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
        if binary is None:
            pytest.skip("no chromium on this machine")
        quiet = [f"--disable-{part}" for part in ("gpu", "dev-shm-usage", "background-networking", "component-update")]
        self.process = subprocess.Popen([binary, "--headless=new", "--no-sandbox", "--no-first-run", *quiet, f"--user-data-dir={folder}",
                                         "--remote-debugging-port=0", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self.until(lambda: (folder / "DevToolsActivePort").read_text().split()[0])
            address = f"http://127.0.0.1:{port}/json"
            page = self.until(lambda: next((t for t in json.load(urllib.request.urlopen(address)) if t["type"] == "page"), None))
            self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], suppress_origin=True, timeout=30)
        except BaseException:
            self.close()
            raise
        self.sent, self.asked = 0, []
        for part in ("Network", "Page", "Runtime"):
            self(f"{part}.enable")

    def until(self, f, seconds=30):
        end = time.monotonic() + seconds
        while True:
            try:
                if found := f():
                    return found
            except (OSError, IndexError, RuntimeError):
                pass
            if time.monotonic() > end:
                raise TimeoutError("chromium does not answer")
            time.sleep(0.1)

    def __call__(self, method, **params):
        self.sent += 1
        self.socket.send(json.dumps({"id": self.sent, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.sent:
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked.append(answer["params"]["request"]["url"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def js(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, path, dark=False):
        self.asked.clear()
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self("Page.navigate", url=path.as_uri())
        self.until(lambda: self.js("document.readyState") == "complete" and self.js("location.href") == path.as_uri())

    def key(self, name):
        code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Tab": 9, "Enter": 13}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def shown(self):
        maps = "[...document.querySelectorAll('.tblens pre')].filter(e => e.checkVisibility())"
        return self.js(maps + ".map(e => e.innerText.split('\\n').pop())")

    def close(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two viewers in a notebook, as our HTML report shows it, without scripts."""
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    from tunebook.kit.report import render_notebook
    views = [viewer(["<script>alert(1)</script>", "b", "c", "d", "e"], W, start=(1, 1)), viewer("abcde", W, 1)]
    outputs = [new_output("display_data", {"text/html": v._repr_html_(), "text/plain": repr(v)}) for v in views]
    path = tmp_path_factory.mktemp("report") / "page.html"
    path.write_text(render_notebook(new_notebook(cells=[new_code_cell("v", outputs=[o]) for o in outputs]), "viewer"), encoding="utf-8")
    return path


def test_the_keyboard_chooses_the_map(browser, report):
    browser.open(report)
    assert browser.shown() == ["layer 1, head 1", "layer 0, head 0"]
    place = "(e => getComputedStyle(e).transform)(document.querySelector('.tblens rect'))"
    assert browser.js(place).endswith("1, 1)")
    browser.key("Tab")
    browser.key("ArrowDown")  # past the last layer: the first
    assert browser.shown() == ["layer 0, head 1", "layer 0, head 0"]
    browser.key("Tab")
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.key("ArrowRight")
    assert browser.shown() == ["layer 0, head 2", "layer 0, head 0"] and browser.js(place).endswith("2, 0)")
    browser.key("Enter")  # a form, but nothing is sent
    browser.key("Tab")
    browser.key("ArrowRight")  # the second viewer is on its own
    assert browser.shown() == ["layer 0, head 2", "layer 1, head 0"]
    assert [u for u in browser.asked if not u.startswith("data:")] == [report.as_uri()]


def test_names_are_read_aloud_and_tokens_are_text(browser, report):
    browser.open(report)
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    names = {(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if "role" in n}
    assert {("form", "attention maps of 2 layers and 3 heads"), ("group", "layer"), ("group", "head"), ("radio", "2")} <= names
    assert browser.js("document.scripts.length") == 0
    assert "<script>aler\n" in browser.js("document.querySelector('.tblens pre').textContent")


def test_colours_follow_the_theme_and_stay_legible(browser, report):
    look = "(e => [e.filter, e.color, e.backgroundColor])(getComputedStyle(document.querySelector('.tblens pre')))"
    browser.open(report)
    assert browser.js(look) == ["none", "rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    browser.open(report, dark=True)
    assert browser.js(look)[0].startswith("invert(1)")


def test_without_styles_one_map_is_left(browser, report, tmp_path):
    path = tmp_path / "plain.html"
    path.write_text(re.sub(r"<style>.*?</style>", "", report.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")
    browser.open(path)
    assert browser.shown() == ["layer 1, head 1", "layer 0, head 0"]
