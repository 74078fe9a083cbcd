"""Serving: who may ask, how often, how much; crowds answered like single guests; every fault one short answer, and a server that stops."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Theirs
from prometheus_client.parser import text_string_to_metric_families

from tunebook.kit.cli import main
from tunebook.tasks.serve import (
    EDGES,
    Batcher,
    Histogram,
    Limits,
    Metrics,
    application,
    at_work,
    client,
    closed_loop,
    listening,
    open_loop,
    open_model,
    percentile,
    plan,
    read_tokens,
    refusal,
    running,
    simulated,
    take,
    threaded,
    who,
)

quick = settings(deadline=None, max_examples=40, derandomize=True)
KEY, OTHER = "a-token-for-the-shop", "a-token-for-the-bank"
MINE = {"Authorization": f"Bearer {KEY}"}
times = st.lists(st.integers(0, 300), max_size=40).map(lambda gaps: [t / 128 for t in accumulate(gaps)])


async def letters(texts): return [{"label": t[::-1], "score": len(t) / 1000} for t in texts]


def served(ask=letters, clock=lambda: 0.0, **limits):
    return application(ask, [KEY, OTHER], Limits(**{"rate": 1.0, "burst": 10_000, "wait": 0.0} | limits), "letters", clock)


def asked(app, *requests, token=KEY):
    """The answers to some requests, one after the other."""
    async def go():
        async with client(app, token) as c: return [await c.request(**{"method": "POST", "url": "/classify"} | r) for r in requests]
    return asyncio.run(go())


# Tokens

@quick
@given(st.text(st.characters(max_codepoint=255), max_size=30))
def test_only_the_whole_token_is_known(text):
    assert who(f"Bearer {text}", [KEY, OTHER]) == {KEY: 0, OTHER: 1}.get(text.strip(" "))
    assert who(text, [KEY]) is None and who(f"Bearer {KEY}", []) is None and who(f"Basic {KEY}", [KEY]) is None


def test_tokens_of_a_file(tmp_path):
    (tmp_path / "t").write_text(f"# the shop\n{KEY}\n\n  {OTHER}  \n")
    assert read_tokens(tmp_path / "t", {}) == [KEY, OTHER] and read_tokens(None, {"TUNEBOOK_TOKEN": KEY}) == [KEY]


@pytest.mark.parametrize("text", ["", "# none", "Xyz", "a-token with a space", "ein-schlüssel-für-alle", KEY + "\nXyz"])
def test_tokens_that_are_none(text):
    with pytest.raises(ValueError, match="make one: python") as e: read_tokens(None, {"TUNEBOOK_TOKEN": text})
    assert not text or text.split("\n")[-1] not in str(e.value)


# Rate

@quick
@given(times, st.sampled_from([0.5, 1.0, 7.0]), st.integers(1, 5))
def test_a_bucket_never_lets_more_through(at, rate, burst):
    state, passed = {"level": float(burst), "at": 0.0}, []
    for t in at:
        ok, state, wait = take(state, t, rate, burst)
        assert 0 <= state["level"] <= burst and (wait == 0) == ok
        passed += [t] * ok
        assert ok or (take(state, t + wait, rate, burst)[0] and not take(state, t + wait * 0.99, rate, burst)[0])
    assert all(j - i + 1 <= burst + rate * (t - s) + 1e-6 for i, s in enumerate(passed) for j, t in enumerate(passed[i:], i))


def test_a_clock_that_goes_back_fills_nothing():
    assert take({"level": 0.5, "at": 9.0}, 3.0, 1.0, 2.0) == (False, {"level": 0.5, "at": 9.0}, 0.5)


def test_too_many_requests_and_later_again():
    now = [0.0]
    app = served(clock=lambda: now[0], rate=0.5, burst=2)

    async def go():
        async with client(app) as c:
            async def ask(token): return await c.post("/classify", json={"texts": ["a"]}, headers={"Authorization": f"Bearer {token}"})
            first = [await ask(KEY) for _ in range(3)]
            other = await ask(OTHER)
            now[0] = 2.0
            return [*first, other, await ask(KEY), await ask(KEY)]
    found = asyncio.run(go())
    assert [r.status_code for r in found] == [200, 200, 429, 200, 200, 429] and found[2].headers["retry-after"] == "2"


# Metrics

@quick
@given(st.lists(st.sampled_from([0.0, 0.004, 0.005, 0.0051, 0.3, 1.0, 9.0, 10.0, 77.0]), max_size=30))
def test_a_histogram_is_that_of_prometheus(seconds):
    ours, theirs = Histogram(), Theirs("x", "", buckets=EDGES, registry=(registry := CollectorRegistry()))
    for s in seconds:
        ours.add(s)
        theirs.observe(s)

    def read(text):
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
        return {(s.name, float(s.labels.get("le", 0))): pytest.approx(s.value) for s in samples if not s.name.endswith("created")}
    assert read("\n".join([*ours.lines("x"), ""])) == read(generate_latest(registry).decode())


@pytest.mark.parametrize("name", ["plain", 'a "quoted" one', "back\\slash", "two\nlines", "größer"])
def test_any_name_can_be_read(name):
    samples = [s for f in text_string_to_metric_families(Metrics(name).text()) for s in f.samples]
    assert next(s.labels["model"] for s in samples if "model" in s.labels) == name


def test_what_is_counted():
    found = asked(served(), {"json": {"texts": ["a", "b"]}}, {"json": {}}, {"method": "GET", "url": f"/{'x' * 50}"},
                  {"method": "GET", "url": "/metrics"})
    assert found[-1].headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {(s.name, s.labels.get("path"), s.labels.get("status")): s.value
               for f in text_string_to_metric_families(found[-1].text) for s in f.samples}
    assert {k[1:]: v for k, v in samples.items() if k[0] == "tunebook_requests_total"} == {
        ("/classify", "200"): 1, ("/classify", "422"): 1, ("other", "404"): 1}
    assert samples["tunebook_texts_total", None, None] == 2 and samples["tunebook_in_flight", None, None] == 1


# Requests that are not as they should be

BAD = {
    "not JSON": (b"{", 400), "nothing": (b"", 422), "not UTF-8": (b'{"texts": ["\xff"]}', 400),
    "a list": (b"[]", 422), "null": (b"null", 422),
    "a number for texts": (b'{"texts": 3}', 422), "a text for texts": (b'{"texts": "a"}', 422), "no text": (b'{"texts": []}', 422),
    "an empty text": (b'{"texts": ["a", ""]}', 422), "spaces": (b'{"texts": [" \\n\\t"]}', 422),
    "null among texts": (b'{"texts": [null]}', 422),
    "half of a pair": (rb'{"texts": ["\ud800"]}', 422), "one more key": (b'{"texts": ["a"], "more": 1}', 422),
    "half of a pair for a key": (rb'{"texts": ["a"], "\ud800": 1}', 422),
    "deep": (b'{"texts": ' + b"[" * 9000 + b"]" * 9000 + b"}", (400, 422)),
    "a long number": (b'{"texts": [' + b"9" * 9000 + b"]}", (400, 422)), "not a number": (b'{"texts": [NaN]}', 422),
    "too many": (json.dumps({"texts": ["a"] * 33}).encode(), 422), "too long": (json.dumps({"texts": ["a" * 2001]}).encode(), 422),
    "too large": (b" " * 65_537, 413)}


@pytest.fixture(scope="module")
def refused():
    found = asked(served(), *({"content": body, "headers": {"Content-Type": "application/json"}} for body, _ in BAD.values()))
    return dict(zip(BAD, found))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_refused_in_one_short_sentence(name, refused):
    r, status = refused[name], BAD[name][1]
    assert r.status_code in (status if isinstance(status, tuple) else (status,)), r.text
    assert list(r.json()) == ["error"] and 5 < len(r.json()["error"]) < 220 and "\n" not in r.json()["error"]
    assert not re.search(r"Traceback|File |\.py|/home|/tmp|site-packages|input_value|https?:", r.text)


@pytest.mark.parametrize("text", ["größer", "我的包裹在哪里？", "🎉" * 500, "a\0b", "\u202eright to left", "e\u0301"])
def test_unicode_comes_and_goes_as_it_is(text):
    r, = asked(served(), {"json": {"texts": [text]}})
    assert r.status_code == 200 and r.json()["answers"][0]["label"] == text[::-1]


def test_a_body_in_chunks_is_counted_and_a_slow_one_given_up():
    sent = []

    async def endless():
        while True:
            sent.append(b"x" * 1000)
            yield sent[-1]

    async def slow():
        yield b"{"
        await asyncio.sleep(30)
    kind = {"Content-Type": "application/json"}
    large, late = asked(served(patience=0.02), {"content": endless(), "headers": kind}, {"content": slow(), "headers": kind})
    assert (large.status_code, late.status_code) == (413, 408) and len(sent) <= 67
    assert large.headers["connection"] == late.headers["connection"] == "close"


def test_who_is_not_known_learns_nothing():
    requests = [{"headers": h, "content": b"{"} for h in ({}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {KEY}"})]
    found = asked(served(), *requests, {"method": "GET", "url": "/metrics"}, {"method": "GET", "url": "/nowhere"}, token="")
    assert [r.status_code for r in found] == [401] * 5 and {r.text for r in found} == {'{"error": "no known token"}'}
    assert all(r.headers["www-authenticate"].startswith("Bearer") for r in found)


def test_a_form_is_told_what_to_send():
    r, = asked(served(), {"data": {"texts": "a"}})
    assert r.status_code == 415 and "application/json" in r.text


def test_a_failure_shows_neither_stack_nor_path(caplog):
    async def breaks(texts): raise RuntimeError("/home/me/secret.py broke")
    r, health = asked(served(breaks), {"json": {"texts": ["a"]}}, {"method": "GET", "url": "/health"})
    assert (r.status_code, r.text, health.status_code) == (500, '{"error": "the server failed"}', 200)
    assert "secret.py broke" in caplog.text


# The page

def test_the_page_needs_no_network_and_no_script():
    docs, schema = asked(served(), {"method": "GET", "url": "/docs"}, {"method": "GET", "url": "/openapi.json"}, token="")
    assert "<script" not in docs.text and not re.search(r"(src|href)=[\"']?(https?:)?//", docs.text) and "POST /classify" in docs.text
    told = schema.json()
    texts = told["components"]["schemas"]["Question"]["properties"]["texts"]
    assert (texts["maxItems"], texts["items"]["maxLength"]) == (32, 2000)
    route = told["paths"]["/classify"]["post"]
    assert route["security"] and set(route["responses"]) == {"200", "400", "401", "408", "413", "415", "422", "429", "503"}


# Batches

@quick
@given(times, st.integers(1, 5), st.sampled_from([0.0, 0.3, 2.0]), st.sampled_from([0.0, 0.5, 3.0]))
def test_a_plan_takes_each_once_and_lets_none_wait_too_long(at, most, wait, fixed):
    batches = plan(at, most, wait, fixed, 0.125)
    assert [i for *_, rows in batches for i in rows] == list(range(len(at)))
    free = float("-inf")
    for start, end, rows in batches:
        assert 1 <= len(rows) <= most and start >= max(free, at[rows[-1]]) and end == start + fixed + 0.125 * len(rows)
        assert start <= max(free, at[rows[0]] + wait)
        free = end


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 4), st.sampled_from([0.3, 1.1]), st.sampled_from([0.0, 0.7]))
def test_the_batcher_does_what_the_plan_says(gaps, most, wait, fixed):
    at = [t / 128 for t in accumulate(gaps)]
    seen = []

    async def ask(texts):
        seen.append([int(t) for t in texts])
        await asyncio.sleep(fixed)
        return texts

    async def one(b, i):
        await asyncio.sleep(at[i])
        return await b.answer([str(i)])

    async def go():
        async with at_work(Batcher(ask, Limits(batch=most, wait=wait, queue=999))) as b:
            return await asyncio.gather(*(one(b, i) for i in range(len(at))))
    assert simulated(go) == [[str(i)] for i in range(len(at))]
    assert seen == [rows for *_, rows in plan(at, most, wait, fixed)]


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.lists(st.lists(st.text(max_size=4), min_size=1, max_size=5), min_size=1, max_size=12), st.integers(1, 6))
def test_a_crowd_gets_the_answers_of_single_guests(questions, most):
    sizes = []

    async def ask(texts):
        sizes.append(len(texts))
        await asyncio.sleep(0.01)
        if "0" in texts: raise ValueError("no")
        return await letters(texts)

    async def go():
        async with at_work(Batcher(ask, Limits(batch=most, wait=0.05, queue=999))) as b:
            return await asyncio.gather(*map(b.answer, questions), return_exceptions=True)
    for q, got in zip(questions, simulated(go)):
        assert isinstance(got, ValueError) if "0" in q else got == asyncio.run(letters(q))
    assert max(sizes) <= max(most, max(map(len, questions)))


def test_a_full_queue_says_so_at_once_and_takes_again_later():
    gate = {}

    async def ask(texts):
        await gate["open"].wait()
        return await letters(texts)

    async def go():
        gate["open"] = asyncio.Event()
        async with client(served(ask, batch=2, queue=3), KEY) as c:
            def post(n): return asyncio.create_task(c.post("/classify", json={"texts": ["a"] * n}))
            first = [post(2)]
            await asyncio.sleep(0.05)  # the model works on it
            first += [post(2), post(1)]
            await asyncio.sleep(0.05)
            turned_away = await post(1)
            health = await c.get("/health")
            gate["open"].set()
            return turned_away, health, await asyncio.gather(*first), await post(3)
    away, health, first, later = asyncio.run(go())
    assert away.status_code == 503 and int(away.headers["retry-after"]) >= 1 and "wait" in away.json()["error"]
    assert [r.status_code for r in (health, *first, later)] == [200] * 5


def test_a_guest_who_leaves_costs_the_others_nothing():
    async def ask(texts):
        await asyncio.sleep(1.0)
        return await letters(texts)

    async def go():
        async with at_work(Batcher(ask, Limits(wait=0.1))) as b:
            leaves, stays = asyncio.create_task(b.answer(["a"])), asyncio.create_task(b.answer(["b"]))
            await asyncio.sleep(0.5)
            leaves.cancel()
            return await stays, await b.answer(["c"])
    assert [a[0]["label"] for a in simulated(go)] == ["b", "c"]


# Load

def test_a_closed_loop_hides_what_an_open_one_shows():
    def test(loop):
        async def go():
            busy = asyncio.Lock()

            async def send(i):
                async with busy: await asyncio.sleep(5.0 if i == 10 else 0.5)
                return 200
            return await loop(send)
        return [s.latency for s in simulated(go)]
    opened, closed = test(lambda send: open_loop(send, [float(i) for i in range(40)])), test(lambda send: closed_loop(send, 1, 40))
    assert sum(x > 1 for x in closed) == 1 and sum(x > 1 for x in opened) == 8
    assert percentile(closed, 0.9) == pytest.approx(0.5) and percentile(opened, 0.9) == pytest.approx(3.0)


def test_tasks_that_wait_for_one_another_are_told():
    async def never(): await asyncio.Event().wait()
    with pytest.raises(RuntimeError, match="nothing will ever happen"): simulated(never)


# A real model, real ports

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from tunebook.kit import models
    where = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30522,
                        max_position_embeddings=64, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    BertForSequenceClassification(config).save_pretrained(where)
    AutoTokenizer.from_pretrained(models.locate("minilm")[1]).save_pretrained(where)
    return where


@pytest.mark.parametrize("method", ["head", "lora", "full"])
def test_what_tune_left_is_served(method, folder, tmp_path):
    from tunebook.tuning import encode, predict, tune
    rows = [{"text": f"The {n} was {w}.", "label": y} for n in ("soup", "tea") for w, y in (("bland", "no"), ("fresh", "yes"))]
    run = tune(folder, method, {"train": rows, "validation": rows}, steps=2, every=2, batch=4, lr=0.01, limit=16, folder=tmp_path)
    model, texts = open_model(tmp_path), [r["text"] for r in rows]
    p = predict(run.model, encode(texts, None, run.tokenizer, 16)).softmax(-1)
    assert (model.classes, model.limit) == (["no", "yes"], 16) and [a["label"] for a in model(texts)] == run.predict(texts)
    assert [a["score"] for a in model(texts)] == p.max(-1).values.tolist()


def test_neighbours_do_not_change_an_answer(folder):
    model = open_model(folder)
    texts = ["tea", "the soup was bland and the bread was stale", "a " * 60, "x"] * 3
    alone = [model([t])[0] for t in texts]

    async def go():
        async with client(served(threaded(model), wait=0.05), KEY) as c:
            return await asyncio.gather(*(c.post("/classify", json={"texts": [t]}) for t in texts))
    told = [r.json()["answers"][0] for r in asyncio.run(go())]
    assert [a["label"] for a in told] == [a["label"] for a in alone]
    assert [a["score"] for a in told] == pytest.approx([a["score"] for a in alone], abs=1e-5)


def test_a_server_that_is_stopped_answers_first_and_stays_healthy_while_it_computes():
    began, release = threading.Event(), threading.Event()

    def work(texts):
        began.set()
        assert release.wait(20)
        return [{"label": "done", "score": 1.0} for _ in texts]
    with ThreadPoolExecutor(1) as pool:
        with running(served(threaded(work))) as url:
            answer = pool.submit(httpx.post, f"{url}/classify", headers=MINE, json={"texts": ["a"]}, timeout=30)
            assert began.wait(20) and httpx.get(f"{url}/health", timeout=20).status_code == 200
            threading.Timer(0.2, release.set).start()
        assert answer.result().json()["answers"] == [{"label": "done", "score": 1.0}]
    with pytest.raises(httpx.ConnectError): httpx.get(f"{url}/health")


def test_the_command_from_start_to_stop(folder, capsys, monkeypatch):
    env = {**os.environ, "TUNEBOOK_TOKEN": KEY, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from tunebook.kit.cli import main; raise SystemExit(main())", "serve", str(folder), "--port", "0"]
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = run.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        kind = MINE | {"Content-Type": "application/json"}
        big = httpx.post(f"{url}/classify", headers=kind, content=(b"x" * 9999 for _ in range(300)))
        statuses = [r.status_code for r in (httpx.get(f"{url}/health"), httpx.post(f"{url}/classify", json={"texts": ["a"]}), big)]
        told = httpx.post(f"{url}/classify", headers=MINE, json={"texts": ["Where is my parcel?"]})
        monkeypatch.setenv("TUNEBOOK_TOKEN", KEY)
        assert main(["serve", str(folder), "--port", url.rpartition(":")[2]]) == 2
        assert re.fullmatch(r"tunebook: port \d+ of 127.0.0.1 is taken: choose another with --port.*\n", capsys.readouterr().err)
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate(timeout=30)
    finally: run.kill()
    assert statuses == [200, 401, 413] and "server" not in told.headers
    assert told.json()["model"] == "tiny" and told.json()["answers"][0]["label"] in ("bad", "good")
    assert (run.returncode, out, err) == (0, "stopped\n", "") and KEY not in line


@pytest.mark.parametrize(("args", "token", "words"), [
    (["nowhere", "--port", "0"], KEY, "nowhere holds no tuned.json or config.json"),
    (["minilm", "--port", "0"], KEY, "minilm knows no classes: tune it first"),
    (["x", "--port", "0"], "", "no token in TUNEBOOK_TOKEN: make one"),
    (["x", "--port", "0"], "short", "token 1 in TUNEBOOK_TOKEN is shorter than 16"),
    (["x", "--port", "0", "--token-file", "gone.txt"], KEY, "the tokens of gone.txt cannot be read: No such file"),
    (["x", "--port", "0", "--rate", "0"], KEY, "--rate must be above 0, got 0"),
    (["x", "--port", "99999"], KEY, "port 99999 of 127.0.0.1 cannot be had"),
    (["x", "--port", "0", "--host", "203.0.113.9"], KEY, "port 0 of 203.0.113.9 cannot be had"),
])
def test_what_cannot_be_served_is_told_in_one_line(args, token, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEBOOK_TOKEN", token)
    assert main(["serve", *args]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and told.out == ""


def test_a_socket_can_be_had_again():
    with listening("127.0.0.1", 0) as sock: port = sock.getsockname()[1]
    listening("127.0.0.1", port).close()


@pytest.mark.parametrize("wait", [0.0, 0.2, 1.0, 59.1])
def test_who_waits_as_long_as_told_has_waited_enough(wait):
    assert int(refusal(429, wait=wait)[1]["Retry-After"]) >= wait
