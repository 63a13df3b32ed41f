"""Checkpoints of others: the names differ, the answers do not.

`dialects.json` and `tiny.safetensors` were written by timm 1.0.31, safetensors 0.8.0, torch 2.15 and torchvision, and
Hugging Face's entries by transformers 5.24.0, with the program below. The first holds, for each dialect, the names and
shapes that a checkpoint has and timm's float64 answer (logits, or features without a head; torchvision's and Hugging
Face's own for theirs) for `wave` images with the weights of `checkpoints.values`.

    def make(**kwargs):
        return VisionTransformer(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2,
                                 **{'num_classes': 0, **kwargs})                 # timm's

    def shapes_of(model, prefix=''):
        return {prefix + n: list(x.shape) for n, x in model.state_dict().items()}

    def add(dialect, shapes, theirs, model):                                     # theirs: timm's name -> the file's
        state = values(shapes)
        model.load_state_dict({n: state[theirs(n)] for n in model.state_dict()})
        golden[dialect] = {'shapes': shapes, 'answer': model.double().eval()(wave((2, 3, 12, 12), 0, 1.0)).tolist()}

    for name, kwargs in {'timm': {}, 'no_qkv_bias': {'qkv_bias': False}, 'flexivit': {'no_embed_class': True},
                         'fc_norm': {'global_pool': 'avg'}}.items():
        m = make(num_classes=3, **kwargs)
        add(name, shapes_of(m), str, m)
    m = make(num_classes=3)
    add('moco_v3_linear', shapes_of(m, 'module.'), 'module.{}'.format, m)
    m = make()
    decoder = ModuleDict({'decoder_embed': Linear(8, 4), 'decoder_norm': LayerNorm(4), 'decoder_pred': Linear(4, 48)})
    add('mae', {'mask_token': [1, 1, 4], 'decoder_pos_embed': [1, 10, 4]} | shapes_of(m) | shapes_of(decoder), str, m)
    both = {}                       # mlp: linear without bias, BatchNorm, ReLU; no ReLU at the end
    for e in ('base_encoder', 'momentum_encoder'):
        both |= shapes_of(m, f'module.{e}.') | shapes_of(mlp(8, 6, 6, 4), f'module.{e}.head.')
    add('moco_v3', both | shapes_of(mlp(4, 6, 4), 'module.predictor.'), 'module.base_encoder.{}'.format, m)
    m = make(init_values=1.0)
    add('dinov2', {'mask_token': [1, 8]} | shapes_of(m), str, m)
    m = make(init_values=1.0, no_embed_class=True, num_classes=3)
    add('deit3', {name of its release: shape}, timm's checkpoint_filter_fn(adapt_layer_scale=True), m)
    for 'jax' with its head of 3 classes, 'jax_in21k' with pre_logits and a head of 5:
        numpy.savez('jax.npz', **values({name of the release: shape}))
        m = make(num_classes=3 or 0)
        m.load_pretrained('jax.npz')                                             # timm's own reader
    m = torchvision.models.VisionTransformer(12, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=32, num_classes=3)
    add('torchvision', shapes_of(m), str, m)
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4,
                 layer_norm_eps=1e-6)                                            # Google's and timm's; theirs is 1e-12
    for 'hugging_face', ViTForImageClassification, ViTConfig(intermediate_size=32, num_labels=3, **sizes);
        'hugging_face_in21k', ViTModel, its last hidden z_cls, the same config;
        'hugging_face_dinov2', Dinov2Model, the same, Dinov2Config(mlp_ratio=4, **sizes);
        'hugging_face_mae', ViTMAEForPreTraining, its .vit, the same, ViTMAEConfig(intermediate_size=32, mask_ratio=0,
            a decoder of 1 layer, 1 head and width 4, **sizes):
        kind(config).save_pretrained('hf')                                       # for its names, sorted
        safetensors.torch.save_file(values({name in the file: shape}), 'hf/model.safetensors')
        m = kind.from_pretrained('hf')                                           # its own reader
    m, kinds = make(num_classes=3), (float32, float16, bfloat16, float64)
    state = {n: x.to(kinds[i % 4]) for i, (n, x) in enumerate(values(shapes_of(m)).items())}
    safetensors.torch.save_file(state, 'tiny.safetensors', metadata={'format': 'pt'})
    m.load_state_dict(state)        # golden 'safetensors'
"""

import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import DIALECTS, HERE, SUFFIXES, copy_of, refusal, same, save, state_of, tiny
from strategies import wave

import vit

FILES = [name for name in DIALECTS if name != 'safetensors']


def model_for(dialect, **sizes):
    """A model for a dialect's file: with a head if its answer is logits."""
    classes = 3 if len(DIALECTS[dialect]['answer'][0]) == 3 else 0
    return tiny(classes, readout='mean' if dialect == 'fc_norm' else 'cls', **sizes)


def named(path, dialect):
    """A path, and which of the ViTs in its file is meant."""
    return f'{path}#base_encoder' if dialect == 'moco_v3' else path


def agree(weights, dialect):
    """Our answer for a file is timm's, or its authors', for the dialect."""
    model = model_for(dialect)
    vit.load_weights(model, named(weights, dialect))
    with torch.no_grad():
        answer = model(wave((2, 3, 12, 12), 0, 1.0).float())
    torch.testing.assert_close(answer, torch.tensor(DIALECTS[dialect]['answer']), rtol=0, atol=1e-6)


def prefixed(state, prefix):
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize('dialect', DIALECTS)
def test_every_dialect_and_a_file_of_the_safetensors_library_give_the_answers_of_their_authors(dialect, tmp_path):
    """The library's has four number formats; integers (BatchNorm's counters) stand beside the weights of others."""
    library = dialect == 'safetensors'
    agree(HERE / 'tiny.safetensors' if library else save(tmp_path / 'a.safetensors', state_of(dialect)), dialect)


@pytest.mark.parametrize('kind', SUFFIXES)
@pytest.mark.parametrize('name', ['weights', 'weights.pth.tar', 'weights.npz', 'weights.safetensors'])
def test_the_first_bytes_of_a_file_tell_its_kind_and_not_its_name(kind, name, tmp_path):
    save(tmp_path / f'whole{kind}', state_of('jax')).rename(tmp_path / name)
    agree(tmp_path / name, 'jax')


def test_a_file_from_before_torch_1_6_is_still_one_of_torch(tmp_path):
    torch.save(state_of('timm'), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    agree(tmp_path / 'old.pth', 'timm')


def test_torchvisions_own_files_have_other_names_in_the_mlp(tmp_path):
    state = {name.replace('mlp.0', 'mlp.linear_1').replace('mlp.3', 'mlp.linear_2'): x
             for name, x in state_of('torchvision').items()}
    assert len(state.keys() - state_of('torchvision').keys()) == 8
    agree(save(tmp_path / 'vit_b_16.pth', state), 'torchvision')


@pytest.mark.parametrize('dialect', FILES)
def test_position_embeddings_of_every_dialect_are_resampled_alike_and_nothing_else_is(dialect, tmp_path):
    """In two of them the class token has no position: here it is 0."""
    path = named(save(tmp_path / 'weights.safetensors', state_of(dialect)), dialect)
    vit.load_weights(model := model_for(dialect), path)
    assert model.pos_embed[:, 0].any() == (dialect not in ('flexivit', 'deit3'))
    for pixels, M in (4, 1), (20, 25):
        vit.load_weights(other := model_for(dialect, pixels=pixels), path)
        expected = copy_of(model) | {'pos_embed': vit.resample_pos_embed(model.pos_embed, M)}
        assert same(other.state_dict(), expected)


AROUND = [  # what people save around a state dict, and what the line says of it
    (lambda s: prefixed(s, 'module._orig_mod.'), 'module._orig_mod; left is nothing'),  # DataParallel, torch.compile
    (lambda s: {'model': s}, 'model; left is nothing'),  # DeiT III
    (lambda s: {'model': s, 'epoch': 3, 'args': {'lr': 0.1}, 'scaler': {}},
     'model; left is args, epoch, scaler'),  # MAE
    (lambda s: {'model': s | {'epoch': 3}}, 'model; left is model.epoch'),
    (lambda s: s | {'epoch': 3, 'arch': 'vit_base'}, 'the ViT; left is arch, epoch'),
    (lambda s: {'model_state_dict': s, 'optimizer': {'state': {0: {'step': torch.tensor(9.0)}}}},
     'model_state_dict; left is optimizer'),
    (lambda s: {'model': {'state_dict': s}}, 'model.state_dict; left is nothing'),
    (lambda s: {'state_dict': prefixed(s, 'net.') | {'loss.weight': torch.ones(3)}, 'hyper_parameters': {'lr': 0.1}},
     'state_dict.net; left is hyper_parameters, state_dict.loss'),  # Lightning
    (lambda s: {'arch': 'vit_base', 'state_dict': prefixed(s, 'module.'), 'best_acc1': torch.tensor(76.7)},
     'state_dict.module; left is arch, best_acc1'),  # MoCo-v3's linear classifier
    (lambda s: prefixed(s, 'opt/target/'), 'opt/target; left is nothing'),  # JAX
    (lambda s: prefixed(s, 'backbone.') | {'register_tokens': torch.ones(1, 4, 8), 'head.mlp.0.bias': torch.ones(3)},
     'backbone; left is head, register_tokens'),
]


@pytest.mark.parametrize('dialect', ['timm', 'hugging_face_dinov2', 'torchvision', 'jax'])
@pytest.mark.parametrize('around, said', AROUND, ids=[said for _, said in AROUND])
def test_a_vit_is_found_wherever_its_patch_embedding_is(around, said, dialect, tmp_path, caplog):
    path = save(tmp_path / 'weights.pth', around(state_of(dialect)))
    agree(path, dialect)
    assert f'{path}: taken is {said}' in [record.message for record in caplog.records]


@pytest.mark.parametrize('head, prefix', [
    ('head', 'backbone.'), ('classifier', 'vit.'), ('state_dict.head', 'state_dict.backbone.')])
def test_a_wrappers_own_head_may_stand_beside_the_vit_and_a_vits_own_is_taken_before_it(head, prefix, tmp_path):
    state = {n.replace('head', head) if 'head' in n else prefix + n: x for n, x in state_of('timm').items()}
    agree(save(tmp_path / 'weights.pth', state), 'timm')
    beside = {f'{head}.weight': torch.ones(3, 8), f'{head}.bias': torch.ones(3)}
    agree(save(tmp_path / 'weights.pth', prefixed(state_of('timm'), prefix) | beside), 'timm')


TWO = [  # two ViTs in a file, by their prefixes
    ('teacher', 'student'), ('student.module.backbone', 'teacher.backbone'), ('state_dict', 'state_dict_ema'),
    ('model', 'model_ema'), ('state_dict.module.base_encoder', 'state_dict.module.momentum_encoder'), ('', 'encoder'),
    ('model', 'model.encoder')]


def two(path, prefixes):
    """A file of two ViTs, and their state dicts."""
    states = [tiny(seed=i).state_dict() for i in (1, 2)]
    both = {}
    for prefix, state in zip(prefixes, states):
        both |= prefixed(state, prefix and f'{prefix}.')
    return save(path / 'weights.safetensors', both), states


@pytest.mark.parametrize('prefixes', TWO, ids=str)
def test_of_two_vits_both_are_named_and_the_one_that_is_asked_for_is_taken(prefixes, tmp_path, caplog):
    path, states = two(tmp_path, prefixes)
    said = refusal(tiny(), path)
    assert all(f'#{prefix}' in said for prefix in prefixes)
    assert 'which ViT?' in refusal(tiny(), f'{path}#other')
    for prefix, state, other in zip(prefixes, states, prefixes[::-1]):
        vit.load_weights(here := tiny(), f'{path}#{prefix}')
        assert same(here.state_dict(), state)
        assert prefix == 'encoder' or other.split('.')[0] in caplog.records[-2].message.partition('left is ')[2]


def test_a_part_of_a_prefix_that_only_one_vit_has_chooses_this_vit(tmp_path):
    path, states = two(tmp_path, TWO[1])
    for asked, i in ('student.module', 0), ('module', 0), ('teacher', 1):
        vit.load_weights(here := tiny(), f'{path}#{asked}')
        assert same(here.state_dict(), states[i])
    for asked in 'backbone', 'teach', '':
        assert 'which ViT?' in refusal(tiny(), f'{path}#{asked}')


def test_the_prefix_of_the_only_vit_may_be_named_and_no_other_and_a_path_may_have_a_hash_sign(tmp_path):
    (tmp_path / 'runs#3').mkdir()
    path = save(tmp_path / 'runs#3' / 'weights.pth', {'model': state_of('timm')})
    agree(path, 'timm')
    shutil.copy(path, tmp_path)
    agree(f'{tmp_path}/weights.pth#model', 'timm')
    assert '#model' in refusal(tiny(), f'{tmp_path}/weights.pth#ema')


@pytest.mark.parametrize('name', [
    'reg_token', 'register_tokens', 'dist_token', 'head_dist.weight', 'blocks.1.attn.relative_position_bias_table',
    'blocks.0.attn.q_norm.weight', 'blocks.0.mlp.w12.weight', 'fc_norm.weight', 'norm_pre.weight'])
def test_what_a_plain_vit_has_not_is_refused_by_name(name, tmp_path):
    """Registers, distillation, relative positions, norms of queries and keys, SwiGLU and more norms."""
    for dialect, prefix in ('timm', ''), ('dinov2', ''), ('moco_v3_linear', 'module.'):
        path = save(tmp_path / 'weights.safetensors', state_of(dialect) | {prefix + name: torch.ones(8)})
        assert f'not of a plain ViT: {name}' in refusal(tiny(), path)


def test_an_fc_norm_is_for_a_model_that_reads_the_mean(tmp_path):
    said = refusal(tiny(), save(tmp_path / 'weights.pth', state_of('fc_norm')))
    assert 'missing: norm.bias, norm.weight; not of a plain ViT: fc_norm.bias' in said and '--set readout=mean' in said


@pytest.mark.parametrize('name', ['vit_small_patch16_rope_ape_224.naver/model.safetensors', 'vit_b_rope_mixed.pth'])
def test_rotary_positions_are_refused_where_the_name_says_so(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert 'rotary positions' in refusal(tiny(), save(tmp_path / name, state_of('timm')))
    agree(save(tmp_path / 'europe_vit.pth', state_of('timm')), 'timm')


def sines(side, rows_first):
    """Fixed positions [1, 1 + side², 384]: of MoCo-v3 with rows first, else of MAE (their code, in other words)."""
    rate = 1 / 10_000 ** (np.arange(96) / 96)
    i, j = np.mgrid[:side, :side].reshape(2, -1, 1) if rows_first else np.mgrid[:side, :side][::-1].reshape(2, -1, 1)
    grid = np.concatenate([np.sin(i * rate), np.cos(i * rate), np.sin(j * rate), np.cos(j * rate)], axis=1)
    return torch.tensor(np.concatenate([np.zeros((1, 384)), grid]), dtype=torch.float32)[None]


@pytest.mark.parametrize('prefix', ['', 'module.', 'module.base_encoder.'])
def test_the_small_vit_of_moco_v3_with_its_12_heads_is_recognised_by_its_positions(prefix, tmp_path):
    """Under any names; those of MAE and learned ones are none of them, nor are they for a model of 12 heads."""
    model, path = vit.ViT(12, 4, (384, 1, 6)), tmp_path / 'weights.safetensors'
    state = copy_of(model)
    for positions in state['pos_embed'], sines(3, rows_first=False):
        vit.load_weights(model, save(path, prefixed(state | {'pos_embed': positions}, prefix)))
    for dtype in torch.float32, torch.float16:
        save(path, prefixed(state | {'pos_embed': sines(3, rows_first=True).to(dtype)}, prefix))
        assert 'ViT-S has 12 heads' in refusal(model, path)
    vit.load_weights(vit.ViT(12, 4, (384, 1, 12)), path)


@pytest.mark.parametrize('N_h', [1, 4])
def test_jax_parameters_for_another_number_of_heads_are_refused(N_h, tmp_path):
    assert f'not for N_h={N_h} heads' in refusal(tiny(N_h=N_h), save(tmp_path / 'weights.npz', state_of('jax')))


@pytest.mark.parametrize('dialect', FILES)
def test_no_parameter_of_any_dialect_can_be_missing(dialect, tmp_path):
    """But those that are dropped, a head, and a LayerScale, which not all ViTs have. The first layer is as the last."""
    model, state = model_for(dialect), state_of(dialect)
    dropped = 'head|decoder|mask_token|momentum|predictor|pre_logits|gamma|lambda|classifier|pooler|[._]0[./]'
    for name in state:
        if not re.search(dropped, name):
            rest = {n: x for n, x in state.items() if n != name}
            said = refusal(model, named(save(tmp_path / 'weights.safetensors', rest), dialect))
            assert 'does not fit this ViT' in said or 'holds no ViT' in said or 'which ViT?' in said


@pytest.mark.parametrize('dialect, head', [('jax_in21k', 5), ('moco_v3', 4), ('moco_v3_linear', 5)])
def test_a_head_behind_more_layers_or_of_more_classes_is_left_out(dialect, head, tmp_path, caplog):
    """JAX, ImageNet-21k: head(tanh(pre_logits(features))); MoCo-v3: a projection. No plain ViT computes these."""
    own = copy_of((model := tiny(classes=head)).head)
    vit.load_weights(model, named(save(tmp_path / 'weights.npz', state_of(dialect)), dialect))
    assert same(own, model.head.state_dict()) and 'its head is left out: head.' in caplog.text
