"""Weights: a timm-format state dict arrives exactly or not at all. Heads, downloads, models by name."""

import hashlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
import yaml
from checkpoints import HERE, SUFFIXES, copy_of, hub, refusal, same, save, tiny  # noqa: F401
from pictures import CONFIGS, NANO, task_of
from pictures import tiny as tiny_run

import data
import train
import vit
from ivpt import IVPT
from vit import InputError


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_arrive_bit_for_bit_in_single_precision_and_give_the_same_logits(dtype, tmp_path):
    there, here, images = tiny(seed=1).to(dtype), tiny(), torch.rand(2, 3, 12, 12)
    vit.load_weights(here, save(tmp_path / 'weights.pth', there.state_dict()))
    there = there.float()
    assert same(here.state_dict(), there.state_dict()) and torch.equal(here(images), there(images))


@pytest.mark.parametrize('there, here, wanted, said', [
    (3, 3, True, 'its head is taken: head.weight [3, 8], head.bias [3]'),
    (5, 3, True, 'its head is left out: head.weight [5, 8], head.bias [5]'),
    (21843, 3, True, 'its head is left out: head.weight [21843, 8], head.bias [21843]'),
    (3, 3, False, None), (5, 3, False, None),  # a new head is expected
    (5, 0, True, None), (0, 3, True, None)])  # there is none
def test_a_head_that_fits_is_taken_if_it_is_wanted_and_one_line_says_what_was_done(there, here, wanted, said, tmp_path,
                                                                                    caplog):
    there, here = tiny(there, seed=1), tiny(here)
    own = copy_of(here.head)
    vit.load_weights(here, file := save(tmp_path / 'weights.pth', there.state_dict()), wanted)
    assert [record.message for record in caplog.records] == ([f'{file}: {said}'] if said else [])
    assert same(here.head.state_dict(), there.head.state_dict() if said and 'taken' in said else own)
    assert all(torch.equal(x, here.state_dict()[name]) for name, x in there.state_dict().items() if 'head' not in name)


def test_a_head_of_the_file_changes_neither_the_first_head_of_a_run_nor_its_identity_with_any_method(tmp_path, caplog):
    """Other weights of the backbone give another identity."""
    state, backbones = vit.build(NANO).state_dict(), set()
    for method in 'linear', 'bias', 'full', 'vpt', 'ivpt':
        heads = []
        for classes in 0, 3, 5:
            of_file = vit.build(NANO, num_classes=classes).head.state_dict()
            file = save(tmp_path / 'a.pth', state | {f'head.{name}': x for name, x in of_file.items()})
            model, identity = train.make_model(tiny_run(method=method, weights=str(file)), task_of(n=3))
            heads.append(model.head.state_dict())
            backbones.add(identity['backbone'])
        assert same(heads[0], heads[1]) and same(heads[0], heads[2]) and heads[0]['weight'].abs().max() < 0.1
    assert len(backbones) == 1 and not caplog.records
    file = save(tmp_path / 'a.pth', state | {'norm.bias': torch.full((64,), 0.001)})
    assert train.make_model(tiny_run(weights=str(file)), task_of(n=3))[1]['backbone'] not in backbones


def test_missing_left_over_and_wrong_parameters_are_named_in_one_line_but_not_all_of_them(tmp_path):
    state = tiny().state_dict()
    del state['norm.bias']
    state |= {'dist_token': torch.zeros(1, 1, 8), 'blocks.1.mlp.fc1.bias': torch.zeros(7)}
    said = refusal(tiny(seed=1), file := save(tmp_path / 'weights.pth', state))
    for part in (str(file), 'missing: norm.bias', 'not of a plain ViT: dist_token',
                 'blocks.1.mlp.fc1.bias [7] for [32]', '--model'):
        assert part in said
    said = refusal(tiny(), save(tmp_path / 'wide.pth', tiny(D=24).state_dict()))
    assert 'blocks.0.attn.proj.bias [24] for [8]' in said and ' more' in said and len(said) < 700


@pytest.mark.parametrize('shape', [(1, 6, 8), (1, 1, 8), (1, 0, 8), (10, 8), (1, 10, 24), (2, 10, 8), (2, 9, 8), ()])
def test_position_embeddings_that_are_no_square_grid_are_refused_by_name(shape, tmp_path):
    said = refusal(tiny(), save(tmp_path / 'weights.pth', tiny().state_dict() | {'pos_embed': torch.zeros(shape)}))
    assert 'of another shape: pos_embed' in said


@pytest.fixture
def server(tmp_path):
    """A web server on this machine. content: what it sends, or by path; length: how long it says that is (0: as long as
    it is, None: nothing); asked: how often, by path."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            web.asked[self.path] += 1
            content = web.content.get(self.path) if isinstance(web.content, dict) else web.content
            self.send_response(200 if content else 404)
            if web.length is not None:
                self.send_header('Content-Length', str(web.length or len(content or b'')))
            self.end_headers()
            self.wfile.write(content or b'')

        def log_message(self, *args):
            pass
    with HTTPServer(('127.0.0.1', 0), Handler) as web:
        web.content = save(tmp_path / 'whole.pth', tiny(seed=1).state_dict()).read_bytes()
        web.length, web.asked = 0, Counter()
        web.url = f'http://127.0.0.1:{web.server_port}'
        threading.Thread(target=web.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
        yield web
        web.shutdown()


def has_come(model, seed=1):
    return same(model.state_dict(), tiny(seed=seed).state_dict())


@pytest.mark.parametrize('length', [0, None])  # a server that does not say it is believed
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_url_is_asked_once_for_a_file_of_any_kind(length, suffix, hub, server, tmp_path, caplog):
    server.content, server.length = save(tmp_path / f'a{suffix}', tiny(seed=1).state_dict()).read_bytes(), length
    for _ in range(2):
        vit.load_weights(model := tiny(), f'{server.url}/a/weights{suffix}?download=true')
        assert has_come(model)
    assert server.asked == {f'/a/weights{suffix}?download=true': 1} and len(list(hub.iterdir())) == 1
    assert len([record for record in caplog.records if 'downloading' in record.message]) == 1


def test_urls_that_differ_in_any_part_are_different_files(hub, server, tmp_path):
    """Query, folders, and the host. It may be one of a file."""
    paths = ['/p/q_r.pth', '/p_q/r.pth', '/p/q_r.pth?id=1', '/p/q_r.pth?id=2', '/q_r.pth']
    server.content = {path: save(tmp_path / 'a.pth', tiny(seed=i).state_dict()).read_bytes()
                      for i, path in enumerate(paths)}
    other_host = server.url.replace('127.0.0.1', 'localhost') + paths[0]
    for _ in range(2):
        for i, url in enumerate([*(server.url + path for path in paths), other_host, (tmp_path / 'a.pth').as_uri()]):
            vit.load_weights(model := tiny(), url)
            assert has_come(model, [0, 1, 2, 3, 4, 0, 4][i])
    assert len(list(hub.iterdir())) == 7 and server.asked == {path: 1 + (path == paths[0]) for path in paths}


@pytest.mark.parametrize('content, length, said', [
    (lambda whole: whole[:5000], None, 'cut short'), (lambda whole: whole[:5000], 30_000, 'cut short'),
    (lambda whole: b'<!DOCTYPE html><title>Sign in</title>', 0, 'it is a web page'),
    (lambda whole: b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 0, 'it is a pointer of Git LFS'),
    (lambda whole: b'', 0, '404')], ids=['cut', 'cut, and the size said', 'page', 'pointer', 'moved'])
def test_what_is_no_checkpoint_is_not_kept_and_the_line_says_which_file_to_put_where(
        content, length, said, hub, server, tmp_path):
    """A connection that ends is no error to torch's download: half a file would be taken for a file for ever."""
    url, whole = f'{server.url}/weights.pth?dl=0', server.content
    server.content, server.length = content(whole), length
    line = refusal(tiny(), url)
    assert f'could not download {url}' in line and said in line and '--weights' in line and not list(hub.iterdir())
    place = line.split('Put that file at ')[1].split(' by hand')[0]
    save(tmp_path / 'a.pth', tiny(seed=2).state_dict()).rename(place)  # do as it says
    vit.load_weights(model := tiny(), url)
    assert has_come(model, 2)


@pytest.mark.parametrize('algorithm, name', [
    ('md5', 'weights.pth#md5={}'), ('sha256', 'weights.pth#sha256={}'), ('md5', 'weights.pth#md5={}#model'),
    ('sha256', 'weights-{}.pth')])  # the last is in torch's style
def test_a_checksum_is_checked_whenever_the_file_is_read(algorithm, name, hub, server, tmp_path):
    server.content = save(tmp_path / 'a.pth', {'model': tiny(seed=1).state_dict()}).read_bytes()
    digits = hashlib.new(algorithm, server.content).hexdigest()
    for wrong in '00000000', digits[::-1]:
        said = refusal(tiny(), f'{server.url}/{name.format(wrong)}')
        assert f'its {algorithm} is {digits} and not {wrong}' in said and not list(hub.iterdir())
    right = f'{server.url}/{name.format(digits[:8])}'
    vit.load_weights(model := tiny(), right)
    assert has_come(model)
    file, = hub.iterdir()
    save(tmp_path / 'b.pth', {'model': tiny(seed=2).state_dict()}).rename(file)  # by hand, under that name
    assert f'{file}' in (said := refusal(tiny(), right)) and 'another one' in said and file.exists()
    assert has_come(model) and f'and not {digits[:8]}' in refusal(tiny(), f'{file}#{algorithm}={digits[:8]}')


@pytest.mark.parametrize('mark', ['crc=1234', 'md5=', 'sha256=xyz', 'md5'])
def test_a_mark_that_is_no_checksum_is_not_ignored(mark, hub, server):
    assert 'which ViT?' in refusal(tiny(), f'{server.url}/weights.pth#{mark}')


def test_the_backbone_of_pets_comes_from_the_papers_public_file():
    """Table 18."""
    settings = train.settings_of(CONFIGS, 'pets', method='ivpt')
    assert settings.machine.weights.startswith('https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz')
    assert settings.backbone.mean == settings.backbone.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize('name, parts, M', [
    ('vit_base_patch16_224', ('base', 16, 224), 196), ('vit_large_patch16_384.augreg_in21k', ('large', 16, 384), 576),
    ('vit_small_patch14_518.dinov2.lvd142m', ('small', 14, 518), 37 ** 2), ('vit_nano_patch8_48', ('nano', 8, 48), 36),
    ('vit_small_patch14_224.dinov2', ('small', 14, 224), 256), ('vit_base_patch14_224.dinov2', ('base', 14, 224), 256)])
def test_names_are_read_as_timms(name, parts, M):
    """DINOv2 is built for 224 pixels of its 37 by 37 positions."""
    with torch.device('meta'):
        assert vit.parse_name(name) == parts and vit.build(name).M == M


@pytest.mark.parametrize('name', ['', 'resnet50', 'vit_base', 'vit_giant_patch14_224', 'vit_base_patch_224',
                                  'vit_base_patch16_224_in21k', 'xvit_base_patch16_224', 'VIT_base_patch8_8',
                                  'vit_small_patch16_rope_224'])
def test_a_name_outside_the_grammar_is_refused_with_the_sizes_there_are(name):
    with pytest.raises(InputError, match='unknown model .*tiny, small, base, large, huge'):
        vit.build(name)


@pytest.mark.parametrize('name, meant', [
    ('vit_tiny_patch16_224.augreg_in21k', ''),
    ('vit_small_patch14_224.dino2', ": did you mean 'vit_small_patch14_224.dinov2'[?]")])
def test_a_name_with_an_unknown_pre_training_is_answered_with_the_way_that_works(name, meant):
    plain = name.partition('.')[0]
    with pytest.raises(InputError, match=f"unknown model '{name}'{meant}; .* it is --model {plain} --weights FILE"):
        train.settings_of(CONFIGS, 'pets', name)
    settings = train.settings_of(CONFIGS, 'pets', plain, changes={'weights': 'FILE'})
    assert (settings.model, settings.machine.weights) == (plain, 'FILE')


@pytest.mark.parametrize('make', [lambda: vit.build(NANO, num_classes=500), lambda: IVPT(vit.build(NANO), 500)],
                         ids=['ViT', 'IVPT'])
def test_a_head_starts_with_standard_deviation_0_02_and_bias_0(make):
    """VPT's own code starts its head otherwise; this is timm's."""
    torch.manual_seed(0)
    head = make().head
    assert abs(head.weight.std() - 0.02) < 2e-4 and abs(head.weight.mean()) < 5e-4 and head.bias.count_nonzero() == 0


@pytest.mark.parametrize('method', ['ivpt', 'linear'])
def test_the_readout_is_a_setting_of_the_model_and_the_mean_for_mae(method):
    model, _ = train.make_model(tiny_run(method=method, readout='mean'), task_of(n=9))
    assert getattr(model, 'vit', model).readout == 'mean'
    for name in CONFIGS['models']:
        readout = train.settings_of(CONFIGS, 'pets', name, method).backbone.readout
        assert readout == ('mean' if name.endswith('.mae') else 'cls')


PUBLISHED = yaml.safe_load((HERE.parent / 'experiments' / 'published.yaml').read_text())['backbones']
PARAMETERS = {'base': 85_798_656, 'large': 303_301_632, 'huge': 630_764_800}  # without a head


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name.startswith('vit')])
def test_the_backbones_of_tables_5_and_6_have_the_papers_size_but_for_large(name):
    """Whole millions, cut off. The 307M for ViT-L/16 are from Dosovitskiy et al. (2021), Table 1; built it has 303M."""
    with torch.device('meta'):
        count = sum(p.numel() for p in vit.build(name, img_size=224).parameters())
    assert count == PARAMETERS[vit.parse_name(name)[0]]
    assert (count // 10 ** 6 == PUBLISHED[name]) == ('large' not in name)


@pytest.mark.parametrize('name', CONFIGS['models'])
def test_every_model_has_a_source_and_what_its_inputs_were_normalised_with(name):
    settings, entry = train.settings_of(CONFIGS, 'pets', name), CONFIGS['models'][name]
    how, weights = settings.backbone, settings.machine.weights
    assert how.img_size in (48, 224, 512) and (how.build or vit.parse_name(name)[2] == how.img_size)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert (how.mean, how.std) == tuple(tuple(entry.get(x, y)) for x, y in zip(('mean', 'std'), imagenet))
    assert weights == 'tests/experiments/nano.pth' or weights.startswith('https://')


def test_the_default_tasks_backbone_is_a_file_of_2_megabytes_found_from_any_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    settings = train.settings_of(CONFIGS, 'where_blue', method='ivpt')
    model, _ = train.make_model(settings, task_of(n=9))
    file = train.HERE / settings.machine.weights
    saved = vit.read_state_dict(file)
    assert all(torch.equal(x, saved[name].float()) for name, x in model.vit.state_dict().items())
    assert file.stat().st_size <= 2e6
    assert not caplog.records


def test_the_backbone_of_the_offline_tasks_answers_what_a_frame_asks():
    """It is pre-trained on these questions; the head that answered them is in the file."""
    changes = {'n_train': 1, 'n_test': 300, 'precision': 'float32'}
    settings = train.settings_of(CONFIGS, 'shapes_framed', changes=changes)
    model = vit.build(NANO, train.HERE / CONFIGS['models'][NANO]['weights'], num_classes=19).eval()
    with torch.no_grad():
        scores = data.accuracy(data.answers(model, data.load(settings).test, settings, torch.device('cpu')))
    assert scores['accuracy'] > 0.9
