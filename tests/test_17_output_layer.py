"""The output layer at the asked positions, logits in pieces, compiled blocks, positions."""

import copy
import threading

import pytest
import torch
from conftest import WIDTHS, loss_of, network, padded, rng, settled

import d1_full as d1


def test_context_of_roberta_knows_where_its_positions_begin():
    from transformers import RobertaConfig, RobertaForMaskedLM
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=16, max_position_embeddings=34)).eval()
    assert d1.context_of(model) == 32
    out = d1.diffuse_decode(model, torch.tensor([[5, 6]]), mask_id=4, gen_length=48, block_length=8, context=32,
                            decoder=d1.WindowedDecoder)
    assert not (out == 4).any()


def test_compiled_blocks_compute_the_same(tiny, monkeypatch):
    ids, compiler = torch.randint(1, 200, (2, 12), generator=rng()), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, **{**how, "backend": "eager"}))  # in no time
    cfg = settled(task="sudoku", compile=True)
    model, _ = d1.open_model(cfg, d1.Screen())
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    plain = copy.deepcopy(tiny[0])
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    assert all(layer._compiled_call_impl is not None for layer in d1.twin(model).model.layers)


def test_output_layer_is_whole_again_after_an_error():
    model = network()
    ids, real = padded()
    want = model(ids).logits
    with pytest.raises(ZeroDivisionError):
        d1.logits_at(model, ids, real, compute=lambda layer, hidden: 1 / 0)
    assert torch.equal(model(ids).logits, want)


def decoded_by(model, number):
    """What one of eight threads decodes: lengths, guidance and noise of its own."""
    prompt, real = padded()
    return d1.diffuse_decode(
        model, prompt + number % 3, mask_id=0, attention_mask=real, gen_length=8 + 8 * (number % 2), block_length=8,
        cfg_scale=float(number % 4 == 3), temperature=0.7 * (number > 3), generator=rng(number))


@pytest.mark.parametrize("kind", ["llama", "dream", "bert"])
def test_output_layer_serves_eight_threads_as_it_serves_one(kind):
    """On the first call too, when the layer is not yet prepared."""
    alone = [decoded_by(network(kind), number) for number in range(8)]
    assert len({tuple(ids.flatten().tolist()) for ids in alone}) == 8
    for _ in range(3):
        model, gate, made = network(kind), threading.Barrier(8), [None] * 8

        def decode(number, model=model, gate=gate, made=made):
            gate.wait()
            made[number] = decoded_by(model, number)

        threads = [threading.Thread(target=decode, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(got is not None and torch.equal(got, want) for got, want in zip(made, alone, strict=True))
        ids, real = padded()
        assert model(ids, attention_mask=real).logits.shape == (3, 7, 50)  # whole again


def test_output_layer_of_a_deep_copy_is_its_own():
    model, (ids, real) = network(), padded()
    first = d1.logits_at(model, ids, real)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2)
    assert torch.allclose(d1.logits_at(twin, ids, real), 2 * first, atol=1e-4)
    assert torch.equal(d1.logits_at(model, ids, real), first)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunked_losses_and_their_gradients_are_the_plain_ones(size):
    layer = torch.nn.Linear(8, 20)
    hidden, target = torch.randn(12, 8, generator=rng()), torch.randint(20, (12,), generator=rng())
    weight, grads = torch.rand(12, generator=rng(3)), []
    for compute in (lambda h: d1.chunked_losses(layer, h, target, size),
                    lambda h: d1.cross_entropies(layer(h), target)):
        h = hidden.clone().requires_grad_()
        ce, hit = compute(h)
        layer.zero_grad()
        (ce * weight).sum().backward()
        grads.append((ce.detach(), hit, h.grad, layer.weight.grad.clone()))
    assert torch.equal(grads[0][1], grads[1][1])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True) if a.dtype != torch.bool)


def test_chunked_losses_hold_few_logits(monkeypatch):
    seen = []
    monkeypatch.setattr(d1, "cross_entropies", lambda logits, y: seen.append(len(logits)) or (logits.sum(1), y > 0))
    d1.chunked_losses(torch.nn.Linear(4, 9), torch.randn(7, 4), torch.zeros(7, dtype=torch.long), 3)
    assert seen == [3, 3, 1]


def test_token_losses_of_a_model_that_scales_its_logits_are_of_the_scaled_ones(tiny, quick):
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        **WIDTHS, vocab_size=len(tiny[1]), num_hidden_layers=1, num_key_value_heads=2, head_dim=8,
        final_logit_softcapping=1.0, initializer_range=0.5, use_cache=False, pad_token_id=0))
    model.config.is_causal = False
    row = (list(range(20, 60)), 10)
    stage = d1.sft_stage(model, tiny[1], [row] * 8, quick(bs_sft=2, rows_sft=2, steps_sft=2))
    loss, metrics = loss_of(d1.Trainer(stage), [row, row], "k")
    capped = 2 + torch.log(torch.tensor(len(tiny[1]))).item()  # by logits in [-1, 1]
    assert torch.isfinite(loss) and metrics["ce"][0] < capped
