"""Cross-entropy and divergence of rows of logits, and their slope, as one Triton kernel: a program for each row.

Annotations are not postponed here: Triton reads them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shearling.kernels.terms import IGNORE, Terms

#: elements that a program holds at a time, and the warps that share them: each thread loads 16 bytes of bf16 at once
BLOCK = 4096
WARPS = 16

_KINDS = {"forward": 1, "reverse": 2, "jensen-shannon": 3}


def head_loss(
    student: Tensor,
    labels: Tensor,
    count: Tensor,
    terms: Terms,
    teacher: Tensor | None = None,
    *,
    with_slope: bool = True,
    block: int = BLOCK,
    warps: int = WARPS,
) -> tuple[Tensor, Tensor]:
    """As head_loss_reference, for logits in bfloat16, float16 or float32 whose rows are contiguous.

    Each row is read in blocks of ``block`` elements, a power of two, by ``warps`` warps.
    """
    rows, vocab = student.shape
    kind = _KINDS[terms.kind] if terms.divergence else 0
    assert teacher is not None or not kind, "a divergence needs a teacher"
    other = student if teacher is None else teacher
    assert other.shape == student.shape and labels.shape == (rows,)
    assert student.stride(1) == 1 and other.stride(1) == 1, "rows must be contiguous"
    assert torch.float64 not in (student.dtype, other.dtype), "the kernel computes in float32"
    entropy, divergence = torch.zeros(2, rows, dtype=torch.float32, device=student.device)
    if not rows:
        return entropy, divergence
    # Triton launches on the current device
    with torch.cuda.device_of(student):
        _head_loss[(rows,)](
            student,
            other,
            labels.contiguous(),
            count,
            entropy,
            divergence,
            student.stride(0),
            other.stride(0),
            float(terms.cross_entropy),
            float(terms.divergence * terms.temperature),
            1.0 / terms.temperature if kind else 1.0,
            float(terms.softcap or 1.0),
            float(terms.teacher_softcap or 1.0),
            ENTROPY=bool(terms.cross_entropy),
            KIND=kind,
            # the two terms have a softmax each only where their temperatures differ
            SPLIT=bool(terms.cross_entropy and kind and terms.temperature != 1),
            CAPPED=terms.softcap is not None,
            TEACHER_CAPPED=terms.teacher_softcap is not None,
            SLOPE=with_slope,
            IGNORE=IGNORE,
            # a number for Triton's interpreter, which cannot make a range of a tensor under NumPy 2.4
            VOCAB=vocab,
            BLOCK=block,
            num_warps=warps,
        )
    return entropy, divergence


@triton.jit
def _head_loss(
    student,
    teacher,
    labels,
    count,
    entropy_out,
    divergence_out,
    student_stride,
    teacher_stride,
    entropy_weight,
    divergence_weight,
    inverse,
    softcap,
    teacher_softcap,
    ENTROPY: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    SLOPE: tl.constexpr,
    IGNORE: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Letters: z and u are the student's and the teacher's logits, s and t their shares of the softmax.

    ``inverse`` is that of the temperature, which ``divergence_weight`` contains once: the derivative divides by it.
    """
    row = tl.program_id(0).to(tl.int64)
    # rows times vocabulary exceeds 32 bits
    student_row = student + row * student_stride
    teacher_row = teacher + row * teacher_stride
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)

    if label == IGNORE:
        if SLOPE:
            for start in range(0, VOCAB, BLOCK):
                at = start + lanes
                tl.store(student_row + at, tl.zeros([BLOCK], tl.float32), mask=at < VOCAB)
        return

    # first pass: greatest logits and sums of exponentials, of each lane its own, so that no lane waits for another
    peak = tl.full([BLOCK], -3e38, tl.float32)
    their_peak = tl.full([BLOCK], -3e38, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    cold = tl.zeros([BLOCK], tl.float32)
    their_mass = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + lanes
        mask = at < VOCAB
        z = _logits(student_row, at, mask, softcap, CAPPED)
        # of the old sum's factor and the new exponential one is 1, the other this; NaN goes into the sum
        gap = -tl.abs(z - peak)
        higher = z > peak
        small = tl.exp(gap * inverse)
        e = tl.where(higher, 1.0, small)
        shrink = tl.where(higher, small, 1.0)
        mass = mass * shrink + e
        if SPLIT:
            small = tl.exp(gap)
            cold = cold * tl.where(higher, small, 1.0) + tl.where(higher, 1.0, small)
        peak = tl.where(higher, z, peak)
        if KIND != 0:
            u = _logits(teacher_row, at, mask, teacher_softcap, TEACHER_CAPPED)
            their_higher = u > their_peak
            their_small = tl.exp(-tl.abs(u - their_peak) * inverse)
            f = tl.where(their_higher, 1.0, their_small)
            their_shrink = tl.where(their_higher, their_small, 1.0)
            their_mass = their_mass * their_shrink + f
            their_peak = tl.where(their_higher, u, their_peak)
            # what is beyond the row is infinity minus infinity
            if KIND == 1:
                cross = cross * their_shrink + tl.where(mask, f * ((u - z) * inverse), 0.0)
            if KIND == 2:
                cross = cross * shrink + tl.where(mask, e * ((z - u) * inverse), 0.0)

    top = tl.max(peak, 0)
    level = tl.exp((peak - top) * inverse)
    total = tl.sum(mass * level, 0)
    log_mass = tl.log(total)
    norm = top + log_mass
    if SPLIT:
        norm = top + tl.log(tl.sum(cold * tl.exp(peak - top), 0))
    if ENTROPY:
        inside = (label >= 0) & (label < VOCAB)
        target = tl.load(student_row + label, mask=inside, other=float("nan")).to(tl.float32)
        tl.store(entropy_out + row, norm - _capped(target, softcap, CAPPED))

    their_top = 0.0
    their_log_mass = 0.0
    value = 0.0
    if KIND != 0:
        their_top = tl.max(their_peak, 0)
        their_level = tl.exp((their_peak - their_top) * inverse)
        their_total = tl.sum(their_mass * their_level, 0)
        their_log_mass = tl.log(their_total)
        shift = (top - their_top) * inverse + log_mass - their_log_mass
        if KIND == 1:
            value = tl.sum(cross * their_level, 0) / their_total + shift
            tl.store(divergence_out + row, value)
        if KIND == 2:
            value = tl.sum(cross * level, 0) / total - shift
            tl.store(divergence_out + row, value)
        if KIND == 3:
            own = tl.zeros([BLOCK], tl.float32)
            theirs = tl.zeros([BLOCK], tl.float32)
            for start in range(0, VOCAB, BLOCK):
                at = start + lanes
                mask = at < VOCAB
                z = _logits(student_row, at, mask, softcap, CAPPED)
                u = _logits(teacher_row, at, mask, teacher_softcap, TEACHER_CAPPED)
                log_s = (z - top) * inverse - log_mass
                log_t = (u - their_top) * inverse - their_log_mass
                over = _over_middle(log_s, log_t)
                own += tl.where(mask, tl.exp(log_s) * over, 0.0)
                theirs += tl.where(mask, tl.exp(log_t) * (over - (log_s - log_t)), 0.0)
            value = tl.sum(own, 0)
            tl.store(divergence_out + row, 0.5 * (value + tl.sum(theirs, 0)))

    # last pass: the slope over the logits, each element by the thread that read it
    if SLOPE:
        scale = 1.0 / tl.load(count).to(tl.float32)
        column = label.to(tl.int32)
        for start in range(0, VOCAB, BLOCK):
            at = start + lanes
            mask = at < VOCAB
            z = _logits(student_row, at, mask, softcap, CAPPED)
            log_s = (z - top) * inverse - log_mass
            s = tl.exp(log_s)
            slope = tl.zeros([BLOCK], tl.float32)
            if ENTROPY:
                share = s
                if SPLIT:
                    share = tl.exp(z - norm)
                slope += tl.where(at == column, share - 1.0, share) * (entropy_weight * scale)
            if KIND != 0:
                u = _logits(teacher_row, at, mask, teacher_softcap, TEACHER_CAPPED)
                log_t = (u - their_top) * inverse - their_log_mass
                if KIND == 1:
                    slope += (s - tl.exp(log_t)) * (divergence_weight * scale)
                if KIND == 2:
                    slope += s * (log_s - log_t - value) * (divergence_weight * scale)
                if KIND == 3:
                    slope += s * (_over_middle(log_s, log_t) - value) * (0.5 * divergence_weight * scale)
            if CAPPED:
                ratio = z / softcap
                slope *= 1.0 - ratio * ratio
            tl.store(student_row + at, slope, mask=mask)


@triton.jit
def _logits(row, at, mask, softcap, CAPPED: tl.constexpr):
    raw = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, _capped(raw, softcap, CAPPED), -float("inf"))


@triton.jit
def _capped(raw, softcap, CAPPED: tl.constexpr):
    """NaN for what is not finite: the cap would hide infinities, and a share of 0 one of minus infinity."""
    z = raw
    if CAPPED:
        # tanh without an exponential that overflows
        small = tl.exp(-2.0 * tl.abs(raw) / softcap)
        size = softcap * ((1.0 - small) / (1.0 + small))
        z = tl.where(raw < 0, -size, size)
    return tl.where(tl.abs(raw) < float("inf"), z, float("nan"))


@triton.jit
def _over_middle(log_s, log_t):
    """log(s / ((s + t) / 2))."""
    gap = log_s - log_t
    return tl.minimum(gap, 0.0) - tl.log(0.5 + 0.5 * tl.exp(-tl.abs(gap)))
