from __future__ import annotations

import pytest
import torch

from shearling.anatomy import anatomy_of
from shearling.methods.ig_lora import LoRAPolicy
from shearling.train import Distillation, TrainSettings, chunked_cross_entropy, train
from tests.tiny import tiny_model, tiny_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SETTINGS = TrainSettings(
    tokens=8 * 4 * 24, length=24, batch=4, micro_batch=3, learning_rate=1e-2, log_every=1, checkpoint_every=1
)


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_bfloat16_training_resumes_to_the_bit(family, lora, tmp_path):
    def start(folder, on_event=None):
        model = tiny_model(family).cuda()
        policies = [Distillation(tiny_model(family, seed=1).cuda())]
        if lora:
            policies.append(LoRAPolicy(anatomy_of(model.config), [2, 3, 4]))
        result = train(model, tiny_tokens(10, 24), policies, SETTINGS, state_dir=folder, on_event=on_event)
        return model, result

    def stop(event):
        if event["step"] == 5:
            raise Stop

    with pytest.raises(Stop):
        start(tmp_path, stop)
    (resumed, result), (undisturbed, expected) = start(tmp_path), start(None)
    assert result.losses == expected.losses and result.losses[-1] < result.losses[0]
    for name, tensor in resumed.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, undisturbed.state_dict()[name]), name


def test_chunked_cross_entropy_under_autocast():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).cuda().requires_grad_()
    weight = torch.randn(500, 64, generator=generator).cuda().requires_grad_()
    labels = torch.randint(0, 500, (300,), generator=generator).cuda()
    labels[::7] = -100
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(rounded[0] @ rounded[1].T, labels)
    expected.backward()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, chunk=64)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    for got, want in zip((hidden, weight), rounded, strict=True):
        assert (got.grad.double() - want.grad).norm() < 2e-2 * want.grad.norm()
