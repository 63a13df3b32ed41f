"""Weights: a timm-format state dict arrives exactly or not at all, and no code in a file is ever run."""

import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIGS

import data
import train
import vit
from ivpt import IVPT
from vit import InputError


def small(pixels=16, classes=3, D=12, seed=0):
    """A ViT of two layers on a grid of patches of 8 pixels."""
    torch.manual_seed(seed)
    model = vit.ViT(pixels, 8, D, 2, 2, num_classes=classes)
    for p in model.parameters():  # so that no two models agree in a single parameter
        p.data.add_(torch.rand_like(p) / 8)
    return model


def saved(folder, state, name='weights.pth'):
    torch.save(state, folder / name)
    return folder / name


def snapshot(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(model, weights):
    """The one line with which weights are refused. The model is what it was."""
    before = snapshot(model)
    with pytest.raises(InputError) as error:
        vit.load_weights(model, weights)
    assert same(before, model.state_dict())
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- What fits ------------------------------------------------------------------------------------------


def test_weights_arrive_bit_for_bit_and_give_the_same_logits(tmp_path, caplog):
    there, here, images = small(seed=1), small(), torch.rand(2, 3, 16, 16)
    vit.load_weights(here, saved(tmp_path, there.state_dict()))
    assert same(here.state_dict(), there.state_dict()) and torch.equal(here(images), there(images))
    assert not caplog.records


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_on_disk_become_single_precision(dtype, tmp_path):
    state = {name: x.to(dtype) for name, x in small(seed=1).state_dict().items()}
    model = small()
    vit.load_weights(model, saved(tmp_path, state))
    assert same(model.state_dict(), {name: x.float() for name, x in state.items()})


@pytest.mark.parametrize('pixels', [8, 24, 40])
def test_position_embeddings_of_another_grid_are_resampled_and_nothing_else_is(pixels, tmp_path):
    there, here = small(16, seed=1), small(pixels)
    vit.load_weights(here, saved(tmp_path, there.state_dict()))
    resampled, state = here.state_dict(), there.state_dict()
    assert torch.equal(resampled.pop('pos_embed'), vit.resample_pos_embed(state.pop('pos_embed'), here.M))
    assert same(resampled, state)
    here(torch.rand(1, 3, pixels, pixels))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_resampling_keeps_the_class_token_and_what_is_the_same_everywhere(old, new, D):
    z_cls, everywhere = torch.rand(1, 1, D), torch.rand(1, 1, D)
    resampled = vit.resample_pos_embed(torch.cat([z_cls, everywhere.expand(1, old ** 2, D)], dim=1), new ** 2)
    assert resampled.shape == (1, 1 + new ** 2, D) and torch.equal(resampled[:, :1], z_cls)
    torch.testing.assert_close(resampled[:, 1:], everywhere.expand(1, new ** 2, D))


def test_resampling_keeps_rows_rows_and_columns_columns():
    grid = torch.stack(torch.meshgrid(torch.arange(4.), torch.arange(4.), indexing='ij'), -1)  # [4, 4, 2]
    pos_embed = torch.cat([torch.zeros(1, 1, 2), grid.view(1, 16, 2)], dim=1)
    row, column = vit.resample_pos_embed(pos_embed, 49)[0, 1:].view(7, 7, 2).unbind(-1)
    assert (row.diff(dim=0) > 0).all() and row.diff(dim=1).abs().max() < 1e-5
    assert (column.diff(dim=1) > 0).all() and column.diff(dim=0).abs().max() < 1e-5


@pytest.mark.parametrize('classes_there, classes_here', [(5, 3), (5, 0), (21843, 3)])
def test_a_head_of_another_size_is_left_out_and_said_so(classes_there, classes_here, tmp_path, caplog):
    there, here = small(classes=classes_there, seed=1), small(classes=classes_here)
    own = snapshot(here.head)
    with caplog.at_level(logging.WARNING):
        vit.load_weights(here, file := saved(tmp_path, there.state_dict()))
    assert f'{file}: its head for {classes_there} classes is left out' in caplog.text
    assert same(own, here.head.state_dict())
    state = there.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in here.state_dict().items() if 'head' not in name)


def test_weights_without_a_head_leave_the_models_own(tmp_path, caplog):
    here = small(classes=3)
    own = snapshot(here.head)
    vit.load_weights(here, saved(tmp_path, small(classes=0, seed=1).state_dict()))
    assert same(own, here.head.state_dict()) and not caplog.records


# ---- What does not fit ----------------------------------------------------------------------------------


def test_missing_left_over_and_wrong_parameters_are_named_in_one_line(tmp_path):
    state = small().state_dict()
    del state['norm.bias']
    state['dist_token'] = torch.zeros(1, 1, 12)
    state['blocks.1.mlp.fc1.bias'] = torch.zeros(7)
    said = refusal(small(seed=1), file := saved(tmp_path, state))
    for part in (str(file), 'missing: norm.bias', 'not of a plain ViT: dist_token',
                 'blocks.1.mlp.fc1.bias [7] for [48]', '--model'):
        assert part in said


def test_weights_of_another_model_are_named_but_not_all_of_them(tmp_path):
    said = refusal(small(), saved(tmp_path, small(D=24).state_dict()))
    assert 'blocks.0.attn.proj.bias [24] for [12]' in said and ' more' in said and len(said) < 700
    deeper = {f'blocks.{i}.norm1.bias': torch.zeros(12) for i in range(2, 12)}
    assert 'blocks.2.norm1.bias' in refusal(small(), saved(tmp_path, small().state_dict() | deeper))


@pytest.mark.parametrize('shape', [(1, 4, 12), (1, 1, 12), (1, 0, 12), (4, 12), (1, 5, 24), (2, 5, 12), ()])
def test_position_embeddings_that_are_no_square_grid_are_refused_by_name(shape, tmp_path):
    said = refusal(small(), saved(tmp_path, small().state_dict() | {'pos_embed': torch.zeros(shape)}))
    assert 'of another shape: pos_embed' in said


@pytest.mark.parametrize('name', ['head.weight', 'head.bias'])
def test_a_head_of_no_shape_at_all_is_a_head_of_another_size(name, tmp_path, caplog):
    vit.load_weights(small(), saved(tmp_path, small().state_dict() | {name: torch.tensor(1.0)}))
    assert 'is left out' in caplog.text


# ---- What is not weights --------------------------------------------------------------------------------


class Evil:
    """Pickled, it writes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


@pytest.mark.parametrize('dump', [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))],
                         ids=['torch.save', 'pickle'])
def test_code_in_a_file_is_not_run(dump, tmp_path):
    dump({'norm.bias': Evil(tmp_path / 'written')}, tmp_path / 'evil.pth')
    with open(tmp_path / 'evil.pth', 'rb') as file:  # were it loaded without care, it would be run
        torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    (tmp_path / 'written').unlink()
    assert 'evil.pth is not a PyTorch state dict' in refusal(small(), tmp_path / 'evil.pth')
    assert not (tmp_path / 'written').exists()


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_of_a_whole_model_is_refused_with_what_to_save_instead(zipped, tmp_path):
    torch.save(small(), tmp_path / 'model.pth', _use_new_zipfile_serialization=zipped)
    said = refusal(small(), tmp_path / 'model.pth')
    assert 'vit.ViT, which is code' in said and 'save model.state_dict() alone' in said and 'download' not in said


@pytest.mark.parametrize('part', [0, 0.001, 0.3, 0.7, 0.999])
def test_a_file_that_is_cut_short_is_refused(part, tmp_path):
    file = saved(tmp_path, small().state_dict())
    whole = file.read_bytes()
    file.write_bytes(whole[:int(part * len(whole))])
    assert 'cut short' in refusal(small(), file)


@pytest.mark.parametrize('what', [
    torch.zeros(3), [torch.zeros(3)], {}, {'model': {'norm': {'bias': torch.zeros(12)}}}, {'norm.bias': 0.0},
    {0: torch.zeros(3)}, None], ids=['tensor', 'list', 'empty', 'nested', 'number', 'no name', 'none'])
def test_what_is_not_names_and_tensors_is_refused(what, tmp_path):
    assert 'holds no state dict' in refusal(small(), saved(tmp_path, what))


def test_other_files_and_folders_are_refused_by_name(tmp_path):
    (tmp_path / 'text.pth').write_text('<html>moved</html>')
    np.savez(tmp_path / 'original.npz', a=np.zeros(3))
    torch.save(small(), tmp_path / 'module.pth')  # a whole model is code
    (tmp_path / 'folder').mkdir()
    for name in ('text.pth', 'original.npz', 'module.pth', 'folder', 'missing.pth'):
        assert str(tmp_path / name) in refusal(small(), tmp_path / name)
    assert 'no such file' in refusal(small(), tmp_path / 'missing.pth')


# ---- Downloads ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch hub's folder for checkpoints, empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    return tmp_path / 'home' / 'hub' / 'checkpoints'


def test_a_url_is_downloaded_once_into_torch_hubs_folder(hub, tmp_path):
    there, here = small(seed=1), small()
    file = saved(tmp_path, there.state_dict())
    vit.load_weights(here, file.as_uri())
    assert same(here.state_dict(), there.state_dict())
    file.unlink()
    vit.load_weights(again := small(seed=2), file.as_uri())
    assert same(again.state_dict(), there.state_dict()) and len(list(hub.iterdir())) == 1


def test_two_urls_that_end_alike_are_two_files(hub, tmp_path):
    for i, folder in enumerate(('a', 'b')):
        (tmp_path / folder).mkdir()
        saved(tmp_path / folder, small(seed=1 + i).state_dict(), 'pytorch_model.bin')
    for i, folder in enumerate(('a', 'b')):
        vit.load_weights(model := small(), (tmp_path / folder / 'pytorch_model.bin').as_uri())
        assert same(model.state_dict(), small(seed=1 + i).state_dict())
    assert len(list(hub.iterdir())) == 2


def test_a_url_that_has_moved_ends_in_a_line_that_says_which_file_to_put_where(hub, tmp_path):
    url = (tmp_path / 'moved' / 'pytorch_model.bin').as_uri()
    said = refusal(small(), url)
    assert f'could not download {url}' in said and '--weights' in said
    assert not list(hub.iterdir())  # not half a file either
    place = said.split('Put that file at ')[1].split(' by hand')[0]
    saved(tmp_path, small(seed=1).state_dict()).rename(place)  # do as it says
    vit.load_weights(model := small(), url)
    assert same(model.state_dict(), small(seed=1).state_dict())


def test_the_backbone_of_pets_comes_from_the_papers_public_file(hub, monkeypatch):
    """Table 18. The network is not asked."""
    def refuse(url, path, *args, **kwargs):
        raise OSError('no network in tests')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    monkeypatch.setattr(vit, 'urlopen', refuse)  # which asks for the size
    config, = train.settings(CONFIGS, 'pets', 'ivpt')
    said = refusal(small(), config.weights)
    assert 'https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz' in said
    assert str(hub) in said and (config.mean, config.std) == ([0.5] * 3, [0.5] * 3)


# ---- Models by name -------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, parts', [
    ('vit_base_patch16_224', ('base', 16, 224)), ('vit_large_patch16_384.augreg_in21k', ('large', 16, 384)),
    ('vit_small_patch14_518.dinov2.lvd142m', ('small', 14, 518)), ('vit_nano_patch8_48', ('nano', 8, 48))])
def test_names_are_read_as_timms(name, parts):
    assert vit.parse_name(name) == parts


@pytest.mark.parametrize('name', ['', 'resnet50', 'vit_base', 'vit_giant_patch14_224', 'vit_base_patch_224',
                                  'vit_base_patch16_224_in21k', 'xvit_base_patch16_224', 'VIT_base_patch8_8'])
def test_a_name_outside_the_grammar_is_refused_with_the_sizes_there_are(name):
    with pytest.raises(InputError, match='unknown model .*tiny, small, base, large, huge'):
        vit.build(name)


def test_the_image_size_of_a_name_can_be_changed():
    assert [vit.build('vit_nano_patch8_48', img_size=pixels).M for pixels in (None, 24, 80)] == [36, 9, 100]


@pytest.mark.parametrize('name', ['vit_nano_patch0_48', 'vit_nano_patch64_48', 'vit_nano_patch8_0'])
def test_an_image_without_a_patch_is_refused(name):
    with pytest.raises(InputError, match='holds no patch'):
        vit.build(name)


@pytest.mark.parametrize('model', [lambda: vit.build('vit_nano_patch8_48', num_classes=500),
                                   lambda: IVPT(vit.build('vit_nano_patch8_48'), 500)], ids=['ViT', 'IVPT'])
def test_a_head_starts_with_standard_deviation_0_02_and_bias_0(model):
    """VPT's own code starts its head otherwise; this is timm's."""
    torch.manual_seed(0)
    head = model().head
    assert abs(head.weight.std() - 0.02) < 2e-4 and abs(head.weight.mean()) < 5e-4 and head.bias.count_nonzero() == 0


@pytest.mark.parametrize('method', ['ivpt', 'linear', 'provp'])
def test_what_is_read_is_a_setting_of_the_model_and_the_mean_for_mae(method):
    config, = train.settings(CONFIGS, 'where_blue', method, changes={'readout': 'mean', 'weights': 'random'})
    model = train.make_model(config, 9)
    assert getattr(model, 'vit', model).readout == 'mean'
    for name in CONFIGS['models']:
        config, = train.settings(CONFIGS, 'pets', method, name)
        assert config.readout == ('mean' if name.endswith('.mae') else 'cls')


def test_an_image_of_another_size_is_refused():
    with pytest.raises(InputError, match=r'\(2, 3, 24, 24\).*16'):
        small()(torch.rand(2, 3, 24, 24))


# ---- The nano ViT that comes with this project ----------------------------------------------------------


def nano():
    config, = train.settings(CONFIGS, 'where_blue', 'ivpt')
    return config


def test_the_default_task_has_its_backbone_here_in_at_most_2_megabytes():
    file = train.HERE / nano().weights
    assert file.is_file() and file.stat().st_size <= 2e6


def test_the_backbone_that_comes_along_is_found_from_any_folder_and_by_the_same_name(tmp_path, monkeypatch):
    """So that machines that share a folder of runs do not take one another's for runs with other settings."""
    monkeypatch.chdir(tmp_path)
    model = train.make_model(nano(), 9)
    assert nano().weights == 'tests/nano.pth'
    saved = vit.read_state_dict(train.HERE / 'tests' / 'nano.pth')
    assert all(torch.equal(x, saved[name]) for name, x in model.vit.state_dict().items())


def test_the_backbone_of_the_offline_tasks_knows_what_a_frame_asks():
    """It is pre-trained on these questions; the head that answered them is in the file."""
    config, = train.settings(CONFIGS, 'shapes_framed', 'pretrain', changes={'n_train': 1, 'n_test': 300, 'precision': 'float32'})
    model = vit.build(config.model, nano().weights, num_classes=19)
    assert train.accuracy(model, data.load(config).test, config, torch.device('cpu')) > 0.9
