"""The grader: right functions pass in any size and dtype, the smallest bug does not, and no student's code breaks it."""

import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tunebook.entropy.gradcheck import KINDS, Verdict, awkward, differences, grade, planted, upstreams, with_backward
from tunebook.kit.checks import close, same

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds, sizes = st.integers(0, 2**31), st.integers(1, 6)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


def softmax(x):
    return x.softmax(-1)


def softmax_backward(up, x):
    p = x.softmax(-1)
    return p * (up - (p * up).sum(-1, keepdim=True))


def linear(x, weight, bias):
    return x @ weight.mT + bias


def linear_backward(up, x, weight, bias):
    return up @ weight, up.mT @ x, up.sum(0)


def rows(draw, n, m):
    return (draw(n, m),)


def layer(draw, n, m):
    return draw(n + 1, m), draw(n, m), draw(n)


OPS = {"softmax": (softmax, softmax_backward, lambda x: F.softmax(x, -1), rows), "linear": (linear, linear_backward, F.linear, layer)}
RIGHT = pytest.mark.parametrize("op", OPS)
CASES = awkward(rows)


# What is right passes

@RIGHT
@quick
@given(seed=seeds, n=sizes, m=sizes, scale=st.sampled_from([0.01, 1.0, 8.0]))
def test_a_right_gradient_passes(op, seed, n, m, scale):
    forward, backward, reference, make = OPS[op]
    cases = awkward(make, sizes=(n, m), scales=(scale,), seed=seed)
    function = with_backward(forward, backward)
    assert grade(function, reference, cases, seed=seed)
    assert grade(function, torch.no_grad()(forward), cases, seed=seed)


@RIGHT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_every_dtype_and_device(op, dtype, device):
    forward, backward, reference, make = OPS[op]
    cases = awkward(make, scales=(1.0,), dtype=dtype, device=device)
    assert all(x.dtype == dtype and x.device.type == device for case in cases for x in case)
    verdict = grade(with_backward(forward, backward), reference, cases)
    assert verdict, str(verdict)
    assert grade(with_backward(forward, lambda up, *inputs: backward(2 * up, *inputs)), reference, cases).check == "gradient"


def test_the_case_decides_the_dtype():
    verdict = grade(lambda x: softmax(x.double()), softmax, awkward(rows, dtype=torch.float32))
    assert verdict.check == "output" and verdict.seen == "expected the dtype torch.float32, got torch.float64"
    inside = with_backward(lambda x: softmax(x.float()).to(x), lambda up, x: softmax_backward(up.float(), x.float()).to(x))
    assert grade(inside, softmax, awkward(rows, dtype=torch.float32))
    assert "float32 inside" in grade(inside, softmax, CASES).hint


def test_what_has_no_gradient_or_is_empty_passes():
    pair = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert grade(lambda x, y: x.detach() * 0 + y, lambda x, y: x * 0 + y, [pair])
    empty = torch.empty(0, 3, dtype=torch.float64, requires_grad=True)
    assert grade(with_backward(softmax, softmax_backward), softmax, [(empty,)])
    scalar = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert grade(lambda x: x.exp(), torch.exp, [(scalar,)]) and grade(lambda x: x.exp(), torch.no_grad()(torch.exp), [(scalar,)])
    assert grade(lambda x: x, lambda x: x, CASES)
    excluded = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert grade(lambda x, m: (x + m).softmax(-1), lambda x, m: x.masked_fill(m < 0, -math.inf).softmax(-1),
                 [(torch.randn(3, 2, dtype=torch.float64, requires_grad=True), excluded)])


# What is wrong does not

@quick
@given(seed=seeds, n=sizes, m=st.integers(2, 6), power=st.integers(1, 22), data=st.data())
def test_one_wrong_entry_is_found_and_counted(seed, n, m, power, data):
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, m - 1))
    bug = torch.zeros(n, m, dtype=torch.float64)
    bug[i, j] = 4 * 2.0**-power

    def backward(up, x):
        return softmax_backward(up, x) + bug
    cases = awkward(lambda draw, a, b: (draw(n, m),), sizes=(1,), scales=(1.0,), seed=seed)
    verdict = grade(with_backward(softmax, backward), softmax, cases)
    assert verdict.check == "gradient" and f"1 of {n * m} numbers are wrong, by up to {4 * 2.0**-power:.2g}" in verdict.seen


@quick
@given(seed=seeds, factor=st.sampled_from([-3.0, 0.0, 0.5, 1 - 1e-6, 1 + 1e-6, 2.0]))
def test_any_multiple_is_found(seed, factor):
    function = with_backward(softmax, lambda up, x: factor * softmax_backward(up, x))
    verdict = grade(function, softmax, awkward(rows, seed=seed), seed=seed)
    assert verdict.check == "gradient"


BUGS = {  # what is wrong: (the operation, right, wrong, a part of the hint)
    "sum missing": ("softmax", " - (p * up).sum(-1, keepdim=True)", "", ""),
    "sum over all": ("softmax", ".sum(-1, keepdim=True)", ".sum()", ""),
    "upstream lost": ("softmax", "p = x.softmax(-1)", "p, up = x.softmax(-1), torch.ones_like(up)", "zero everywhere"),
    "sign": ("softmax", "return p * (", "return -p * (", "its sign is wrong"),
    "times rows": ("softmax", "return p * (", "return len(p) * p * (", "times n, where n is dimension 0 of x"),
    "by the root of the width": ("softmax", "return p * (", "return p / p.shape[-1] ** 0.5 * (", "by sqrt(n), where n is dimension 1"),
    "a constant": ("softmax", "return p * (", "return 1.7 * p * (", "a multiple of the right one"),
    "layout": ("softmax", "p = x.softmax(-1)", "p, up = x.softmax(-1), up.as_strided(up.shape, (up.shape[-1], 1))", "layout in memory"),
    "float32": ("softmax", "p = x.softmax(-1)", "p = x.float().softmax(-1).double()", "float32 inside"),
    "remembers": ("softmax", "x.softmax(-1)", "softmax_backward.__dict__.setdefault(x.shape, x.softmax(-1))", ""),
    "tail": ("softmax", "return p * (up - (p * up).sum(-1, keepdim=True))",
             "g = p * (up - (p * up).sum(-1, keepdim=True)); g[len(g) // 2 * 2:] *= 2; return g", "only the last along dimension 0"),
    "offset": ("softmax", "keepdim=True))", "keepdim=True)) + up.mean(-1, keepdim=True)", "one number for each row"),
    "transposed": ("linear", "up.mT @ x", "(up.mT @ x).mT", "transposed"),
    "swapped": ("linear", "up @ weight, up.mT @ x", "up.mT @ x, up @ weight", ""),
    "of ones": ("linear", "up.sum(0)", "torch.ones_like(up).sum(0)", "ones from above"),
    "none": ("linear", "up.sum(0)", "None", "bias is detached"),
    "too few": ("linear", "return up @ weight, up.mT @ x, up.sum(0)", "return up @ weight, up.mT @ x", "bias is detached"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_named(bug):
    op, right, wrong, hint = BUGS[bug]
    forward, backward, reference, make = OPS[op]
    verdict = grade(with_backward(forward, planted(backward, right, wrong)), reference if op == "softmax" else linear, awkward(make))
    assert not verdict and verdict.check in ("gradient", "graph") and hint in verdict.hint, str(verdict)
    own = torch.no_grad()(forward)
    assert not grade(with_backward(forward, planted(backward, right, wrong)), own, awkward(make))


def test_wrong_in_a_second_call_only():
    known = set()

    def doubles_what_it_knows(x):
        key = str(x.detach().flatten().tolist())
        factor = 2 if key in known else 1
        known.add(key)
        return softmax(x) * factor
    verdict = grade(doubles_what_it_knows, softmax, CASES)
    assert verdict.check == "values" and "in a second call" in verdict.seen and "remembered" in verdict.hint


def test_values_wrong_and_different_each_time():
    g = torch.Generator().manual_seed(0)
    verdict = grade(lambda x: softmax(x) * torch.rand(x.shape, generator=g, dtype=x.dtype), softmax, CASES)
    assert verdict.check == "values" and "dropout" in verdict.hint


@pytest.mark.parametrize("kind", [1, 2])
def test_each_kind_of_upstream_is_named(kind):
    def backward(up, x):
        mine, plain = upstreams(x)[kind].stride(), upstreams(x)[0].stride()
        return 3 * up * x**2 * (2 if up.stride() == mine != plain else 1)
    verdict = grade(with_backward(lambda x: x**3, backward), lambda x: x**3, CASES)
    assert KINDS[kind] in verdict.seen and "layout" in verdict.hint


# Nothing that a student returns breaks it

class Odd(torch.Tensor):
    """Says that it equals everything."""

    def __eq__(self, other):
        return True


def raising(error):
    def f(x):
        raise error
    return f


def hopeless(x):
    return hopeless(x)


def forgets(x):
    softmax(x)


def halves_in_place(x):
    x.data.mul_(0.5)
    return softmax(2 * x)


def overwrites(x):
    e = x.exp()
    out = e / e.sum(-1, keepdim=True)
    e.zero_()
    return out


def stops_gradients(x):
    torch.set_grad_enabled(False)
    return softmax(x)


STUDENTS = {  # function of x (n, m) instead of softmax: (it, the check that fails, a part of what is said)
    "not a function": (None, "runs", "not callable"),
    "not written": (raising(NotImplementedError), "runs", "not written yet"),
    "raises": (raising(KeyError("x")), "runs", "raised KeyError: 'x'"),
    "exits": (raising(SystemExit(0)), "runs", "raised SystemExit: 0"),
    "recurses": (hopeless, "runs", "RecursionError"),
    "wants more": (lambda x, y: x, "runs", "missing 1 required positional argument"),
    "returns nothing": (forgets, "output", "a return is missing"),
    "returns a tuple": (lambda x: (softmax(x), x), "output", "got tuple"),
    "returns NumPy": (lambda x: softmax(x).detach().numpy(), "output", "got ndarray"),
    "returns a number": (lambda x: 1.0, "output", "got float"),
    "another shape": (lambda x: softmax(x)[0], "output", "expected the shape (1, 1), got (1,)"),
    "would broadcast": (lambda x: softmax(x)[:1], "output", "expected the shape (2, 1), got (1, 1)"),
    "another dtype": (lambda x: softmax(x).float(), "output", "expected the dtype torch.float64, got torch.float32"),
    "integers": (lambda x: softmax(x).long(), "output", "got torch.int64"),
    "complex": (lambda x: softmax(x).to(torch.complex128), "output", "got torch.complex128"),
    "another device": (lambda x: softmax(x).to("meta"), "output", "expected the device cpu, got meta"),
    "sparse": (lambda x: softmax(x).to_sparse(), "output", "layout"),
    "nested": (lambda x: torch.nested.nested_tensor([softmax(x)[0]]), "", ""),
    "NaN": (lambda x: softmax(x) * math.nan, "output", "1 of 1 numbers are NaN"),
    "infinite": (lambda x: softmax(x) / 0, "values", "wrong, by up to inf"),
    "wrong values": (lambda x: x.exp(), "values", "numbers are wrong"),
    "over rows": (lambda x: x.softmax(0), "values", ""),
    "edits its input": (halves_in_place, "inputs", "it changed"),
    "detaches": (lambda x: softmax(x.detach()), "graph", "no graph"),
    "through NumPy": (lambda x: torch.from_numpy(softmax(x).detach().numpy()), "graph", "NumPy"),
    "another graph": (lambda x: softmax(x).detach().requires_grad_(), "graph", "no gradient reaches"),
    "overwrites what it needs": (overwrites, "gradient", "overwritten in place"),
    "stops gradients": (stops_gradients, "graph", "no graph"),
    "edits upstream": (with_backward(softmax, lambda up, x: softmax_backward(up, x) + 0 * up.mul_(2)), "inputs", "the gradient from above"),
    "gradient raises": (with_backward(softmax, lambda up, x: 1 / 0), "gradient", "raised ZeroDivisionError: division by zero"),
    "gradient exits": (with_backward(softmax, lambda up, x: raising(SystemExit(3))(x)), "gradient", "SystemExit"),
    "gradient of another shape": (with_backward(softmax, lambda up, x: up.new_zeros(5)), "gradient", "raised RuntimeError"),
    "too many gradients": (with_backward(softmax, lambda up, x: (up, up)), "gradient", "raised"),
    "gradient is a number": (with_backward(softmax, lambda up, x: 1.0), "gradient", "raised"),
    "gradient None": (with_backward(softmax, lambda up, x: None), "graph", "no gradient reaches"),
    "gradient NaN": (with_backward(softmax, lambda up, x: up * math.nan), "gradient", "numbers are wrong, by up to nan"),
}


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_gets_a_verdict(student):
    function, check, told = STUDENTS[student]
    verdict = grade(function, softmax, CASES)
    assert isinstance(verdict, Verdict) and not verdict and "\n" not in verdict.seen
    assert check in ("", verdict.check) and told in str(verdict), str(verdict)
    assert torch.is_grad_enabled()


def test_a_liar_s_equality_is_not_asked():
    assert not grade(lambda x: (2 * softmax(x)).as_subclass(Odd), softmax, CASES)


def test_a_keyboard_interrupt_still_stops():
    with pytest.raises(KeyboardInterrupt):
        grade(raising(KeyboardInterrupt), softmax, CASES)


def test_inputs_stay_as_they_were():
    cases = awkward(layer)
    before = [[x.detach().clone() for x in case] for case in cases]
    grade(lambda x, w, b: linear(x.data.zero_(), w.data.zero_(), b), linear, cases)
    for case, was in zip(cases, before):
        for x, y in zip(case, was):
            same(x, y)
            assert x.grad is None


def test_same_verdict_each_time_and_no_seed_is_used_up():
    state = torch.random.get_rng_state()
    first, second = (str(grade(lambda x: x.softmax(0), softmax, awkward(rows))) for _ in range(2))
    assert first == second and torch.equal(state, torch.random.get_rng_state())


def test_a_verdict_takes_less_than_a_second():
    def attend(q, k, v):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    cases = awkward(lambda draw, n, m: (draw(n, m), draw(n, m), draw(n, m)))
    grade(attend, F.scaled_dot_product_attention, cases[:1])
    start = time.process_time()
    assert grade(attend, F.scaled_dot_product_attention, cases)
    assert not grade(lambda q, k, v: 2 * attend(q, k, v), F.scaled_dot_product_attention, cases)
    assert time.process_time() - start < 2  # two verdicts


# The parts

@quick
@given(seed=seeds, shape=st.lists(st.integers(1, 4), max_size=3))
def test_differences_are_autograd_s(seed, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for f in (torch.sin, lambda x: x.exp().sum(), lambda x: torch.stack([x.flatten()[0].sin(), x.prod()])):
        out = f(x)
        theirs = torch.autograd.functional.jacobian(f, x).permute([*range(out.ndim, out.ndim + x.ndim), *range(out.ndim)])
        ours = differences(f, x)
        assert ours.shape == x.shape + out.shape
        assert (ours - theirs).abs().max() < 1e-8 * (1 + x.exp().sum())


@quick
@given(seed=seeds, n=sizes)
def test_differences_of_a_parabola_have_no_truncation(seed, n):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    close(differences(lambda x: (x**2).sum(), x, h=0.5), 2 * x, terms=20, scale=float(4 + 4 * x.square().sum()))


@quick
@given(seed=seeds, shape=st.lists(st.integers(1, 4), max_size=3), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_upstreams(seed, shape, dtype):
    out = torch.zeros(shape, dtype=dtype)
    ups = upstreams(out, seed)
    assert len(ups) == len(KINDS) and all(u.shape == out.shape and u.dtype == dtype for u in ups)
    assert ups[0].is_contiguous() and ups[1].permute(tuple(range(out.ndim))[::-1]).is_contiguous()
    assert set(ups[2].stride()) <= {0} and ups[2].max() == ups[2].min() <= -1
    assert all(torch.equal(a, b) for a, b in zip(ups, upstreams(out, seed)))


def test_awkward_sizes():
    cases = awkward(lambda draw, n, m: (draw(n, m), "x"), sizes=(1, 4), scales=(1.0, 1e-3, 100.0))
    assert [tuple(x.shape) for x, _ in cases] == [(1, 1), (1, 4), (4, 1), (4, 4)] * 3
    assert all(x.requires_grad and x.is_leaf and x.dtype == torch.float64 for x, _ in cases)
    assert cases[7][0].abs().max() < 0.01 < 10 < cases[11][0].abs().max()


def test_a_hand_made_gradient_takes_other_inputs_and_second_derivatives():
    def power(x, n, note=None):
        return x**n

    def power_backward(up, x, n, note):
        return up * n * x ** (n - 1)
    f = with_backward(power, power_backward)
    x = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: f(x, 3, "a note"), x) and torch.autograd.gradgradcheck(lambda x: f(x, 3, None), x)
    assert grade(f, power, [(x, 3, "a note")]) and not grade(f, power, [(x, 0.5, None)]).where.startswith("input")


# Bad input

def test_bad_cases():
    with pytest.raises(ValueError, match="expected at least one case, got none: nothing would be graded"):
        grade(softmax, softmax, [])
    with pytest.raises(ValueError, match=r"expected a tensor with requires_grad=True in each case, got x \(2,\): mark one"):
        grade(softmax, softmax, [(torch.ones(2),)])


def test_bad_references():
    with pytest.raises(TypeError, match="expected a reference that returns one tensor, got tuple"):
        grade(softmax, lambda x: (x, x), CASES)
    with pytest.raises(ValueError, match="expected a reference without NaN, in values and gradients: choose other inputs"):
        grade(softmax, lambda x: x.log(), CASES)
    with pytest.raises(ValueError, match="without NaN"):
        grade(softmax, lambda x: (x * 0).sqrt() * 0, [(torch.zeros(2, requires_grad=True),)])


def test_bad_differences():
    for x in (torch.ones(2, dtype=torch.int64), torch.empty(0)):
        with pytest.raises(ValueError, match="expected a floating tensor with at least one entry, got .*: choose another x"):
            differences(torch.sin, x)


def test_bad_bug():
    for right, n in (("nowhere", 0), ("up", 3)):
        with pytest.raises(ValueError, match=f"expected '{right}' once in softmax_backward, found it {n} times: renew the bug"):
            planted(softmax_backward, right, "")
