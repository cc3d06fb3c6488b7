"""Sharing: a model goes to a hub that is a folder behind a small server, and comes back as the same file; its card is text and nothing else."""
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from markdown_it import MarkdownIt

huggingface_hub = pytest.importorskip('huggingface_hub')
from huggingface_hub import constants
from local_hub import TOKEN, LocalHub

from lamella.base.bundle import EXPORT_MEMBERS, BundleError, read_bundle, write_bundle
from lamella.base.pickling import UntrustedError
from lamella.export.card import MARK, as_code, model_card
from lamella.export.hub import HubError, from_hub, push_to_hub
from lamella.export.loading import load_learner, read_spec


@pytest.fixture(scope='module')
def learner(tmp_path_factory):
    from conftest import make_photos
    from lamella.metrics import accuracy
    from lamella.vision.all import ImageDataLoaders, Resize, vision_learner
    folder = tmp_path_factory.mktemp('learner')
    dls = ImageDataLoaders.from_folder(make_photos(folder/'photos', n=4), valid_pct=0.25, seed=1, item_tfms=Resize(32), bs=2, num_workers=0, device='cpu')
    learn = vision_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy, path=folder)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn


@pytest.fixture(scope='module')
def file(learner, tmp_path_factory): return learner.export(tmp_path_factory.mktemp('file')/'model.pkl')


@pytest.fixture
def photo(learner): return learner.path/'photos'/'dog'/'1.jpg'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub, an empty cache, and no waiting for what would be tried again"
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path/'token'))
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setenv('no_proxy', '127.0.0.1,localhost')
    def impatient(seconds): raise AssertionError(f'waits for {seconds} seconds')
    monkeypatch.setattr(time, 'sleep', lambda s: impatient(s) if s >= 0.5 else None)
    with LocalHub(tmp_path/'hub') as local: yield local


def at(hub, **kwargs): return dict(endpoint=hub.address, token=TOKEN, **kwargs)


def refused(kind, match, func, *args, **kwargs):
    with pytest.raises(kind, match=match) as caught: func(*args, **kwargs)
    assert '\n' not in str(caught.value) and TOKEN not in str(caught.value)
    return caught.value


# There and back

@pytest.mark.parametrize('lfs', [False, True])
def test_there_and_back(hub, file, photo, monkeypatch, lfs):
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    hub.lfs = lfs
    commit = push_to_hub(file, 'me/pets', about=dict(trained_on='photographs'), **at(hub))
    assert commit.endswith(hub.head('me/pets'))
    assert set(hub.files('me/pets')) == {'model.pkl', 'README.md'} and hub.files('me/pets')['model.pkl'].read_bytes() == file.read_bytes()
    assert any('/lfs/objects/batch' in path for _, path in hub.requests) is lfs
    there, here = from_hub('me/pets', **at(hub)).predict(photo), load_learner(file).predict(photo)
    assert there.label == here.label and torch.equal(there[2], here[2])


def test_a_learner_is_sent_and_leaves_no_file(hub, learner, photo):
    before = sorted(learner.path.rglob('*'))
    push_to_hub(learner, 'me/pets', **at(hub))
    assert sorted(learner.path.rglob('*')) == before
    assert from_hub('me/pets', **at(hub)).predict(photo).label == learner.predict(photo).label


def test_an_older_commit_is_still_there(hub, file, tmp_path):
    push_to_hub(file, 'me/pets', **at(hub))
    first = hub.head('me/pets')
    spec = json.loads(read_bundle(file, EXPORT_MEMBERS)['spec.json'])
    spec['pipeline']['targets'][0][0]['args']['vocab'] = ['Katze', 'Hund']
    push_to_hub(write_bundle(tmp_path/'german.pkl', {**read_bundle(file, EXPORT_MEMBERS), 'spec.json': json.dumps(spec).encode()}), 'me/pets', **at(hub))
    assert [list(from_hub('me/pets', revision=o, **at(hub)).vocab) for o in (None, first)] == [['Katze', 'Hund'], ['cat', 'dog']]


def test_the_code_of_the_card_works(hub, file, photo, tmp_path):
    push_to_hub(file, 'me/pets', **at(hub))
    code = re.search('```python\n(.*?)```', hub.files('me/pets')['README.md'].read_text(), re.S)[1]
    (tmp_path/'user').mkdir()
    (tmp_path/'user'/'picture.jpg').write_bytes(photo.read_bytes())
    env = {**os.environ, 'HF_ENDPOINT': hub.address, 'HF_HOME': str(tmp_path/'home'), 'no_proxy': '127.0.0.1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'user', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    label, probability = done.stdout.split()
    expected = load_learner(file).predict(photo)
    assert label == expected.label and float(probability) == pytest.approx(expected.probability, abs=1e-5)


# What is already there

def test_a_card_by_hand_is_kept(hub, file):
    push_to_hub(file, 'me/pets', **at(hub))
    assert MARK in hub.files('me/pets')['README.md'].read_text()
    push_to_hub(file, 'me/pets', about=dict(license='mit'), **at(hub))
    assert 'license: mit' in hub.files('me/pets')['README.md'].read_text() # ours is written anew
    push_to_hub(file, 'me/pets', card='# Written by hand', **at(hub))
    push_to_hub(file, 'me/pets', **at(hub))
    assert hub.files('me/pets')['README.md'].read_text() == '# Written by hand'
    push_to_hub(file, 'me/pets', card=True, **at(hub))
    assert MARK in hub.files('me/pets')['README.md'].read_text()


def test_without_card(hub, file):
    push_to_hub(file, 'me/pets', card=False, **at(hub))
    assert set(hub.files('me/pets')) == {'model.pkl'}


def test_private(hub, file):
    push_to_hub(file, 'me/secret', private=True, **at(hub))
    assert 'me/secret' in hub.private
    push_to_hub(file, 'me/secret', private=True, **at(hub))
    refused(HubError, 'or it is private', from_hub, 'me/secret', endpoint=hub.address, token=False)
    push_to_hub(file, 'me/open', **at(hub))
    before = hub.head('me/open')
    refused(HubError, 'it is there already, and public', push_to_hub, file, 'me/open', private=True, **at(hub))
    assert hub.head('me/open') == before


# Errors

@pytest.mark.parametrize('part,status,match', [('/api/models', 429, 'too many requests'), ('/api/models', 500, 'try again later'), ('/api/repos/create', 401, 'hf auth login'),
    ('/api/repos/create', 403, 'permission to write'), ('/commit/', 403, 'permission to write'), ('/commit/', 413, 'too large'), ('/commit/', 409, 'by somebody else')])
def test_answers_of_the_hub(hub, file, part, status, match):
    hub.answers += [(part, status)]
    error = refused(HubError, match, push_to_hub, file, 'me/pets', **at(hub))
    assert error.__cause__ is not None and not hub.answers
    assert not hub.files('me/pets')


def test_what_is_not_there(hub, file):
    push_to_hub(file, 'me/pets', **at(hub))
    refused(HubError, "no file 'export.pkl'; it has 'README.md', 'model.pkl'", from_hub, 'me/pets', 'export.pkl', **at(hub))
    refused(HubError, "no revision 'v2'", from_hub, 'me/pets', revision='v2', **at(hub))
    refused(HubError, "no revision 'v2'", push_to_hub, file, 'me/pets', revision='v2', **at(hub))
    refused(HubError, "no repository 'me/dogs'", from_hub, 'me/dogs', **at(hub))
    refused(HubError, 'hf auth login', from_hub, 'me/pets', endpoint=hub.address, token='hf_wrong')
    refused(HubError, 'Repo id', from_hub, 'me/../pets', **at(hub))


def test_nothing_is_asked_for_what_cannot_be_sent(hub, file, tmp_path):
    (tmp_path/'fastai.pkl').write_bytes(pickle.dumps({'a': 1}))
    refused(BundleError, 'fastai exports', push_to_hub, tmp_path/'fastai.pkl', 'me/pets', **at(hub))
    refused(FileNotFoundError, 'there is no file', push_to_hub, tmp_path/'nothing.pkl', 'me/pets', **at(hub))
    refused(ValueError, "'user/name'", push_to_hub, file, 'pets', **at(hub))
    refused(TypeError, 'a learner, or a file', push_to_hub, load_learner(file), 'me/pets', **at(hub))
    refused(TypeError, "Did you mean 'license'", push_to_hub, file, 'me/pets', about=dict(licence='mit'), **at(hub))
    assert not hub.requests


def test_without_a_network(hub, file, photo):
    push_to_hub(file, 'me/pets', **at(hub))
    expected = from_hub('me/pets', **at(hub)).predict(photo)
    hub.close()
    assert torch.equal(from_hub('me/pets', **at(hub)).predict(photo)[2], expected[2]) # from the cache, without waiting
    refused(HubError, 'cannot be reached', from_hub, 'me/dogs', **at(hub))
    refused(HubError, 'cannot be reached', push_to_hub, file, 'me/pets', **at(hub))


def test_offline(hub, file, monkeypatch):
    push_to_hub(file, 'me/pets', **at(hub))
    from_hub('me/pets', **at(hub))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    huggingface_hub.utils._http.close_session()
    asked = len(hub.requests)
    assert list(from_hub('me/pets', **at(hub)).vocab) == ['cat', 'dog']
    refused(HubError, 'HF_HUB_OFFLINE is set', from_hub, 'me/dogs', **at(hub))
    refused(HubError, 'HF_HUB_OFFLINE is set', push_to_hub, file, 'me/pets', **at(hub))
    assert len(hub.requests) == asked


# A hub is other people's

class Evil:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call[0], self.call[1:]


def test_what_is_fetched_is_checked(hub, file, tmp_path):
    push_to_hub(file, 'me/pets', **at(hub))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    hub.commit('me/pets', {'model.pkl': bytes(data)})
    refused(BundleError, "'me/pets' on the hub: .*was altered", from_hub, 'me/pets', **at(hub))
    marker = tmp_path/'ran'
    hub.commit('me/pets', {'model.pkl': pickle.dumps(Evil(os.system, f'touch {marker}'))})
    refused(BundleError, 'no zip', from_hub, 'me/pets', **at(hub))
    members = {**read_bundle(file, EXPORT_MEMBERS), 'objects.pkl': pickle.dumps([Evil(os.system, f'touch {marker}')]), 'objects.safetensors': b'\x02\0\0\0\0\0\0\0{}'}
    hub.commit('me/pets', {'model.pkl': write_bundle(tmp_path/'x.pkl', members).read_bytes()})
    refused(UntrustedError, "'me/pets' on the hub: .*trust=True", from_hub, 'me/pets', **at(hub))
    assert not marker.exists()


# The card

def test_the_hub_understands_the_card(file):
    card = huggingface_hub.ModelCard(model_card(file, repo_id='me/pets', trained_on='Photographs of pets', license='mit', tags=['pets']))
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license, card.data.model_name) == ('lamella', 'image-classification', 'mit', 'pets')
    assert card.data.tags == ['lamella', 'pytorch', 'pets'] and card.data.metrics == ['accuracy']
    result, = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('Photographs of pets', 'accuracy', read_spec(file)['metrics']['accuracy'])


def test_the_card_says_what_the_file_says(file, learner):
    text = model_card(file)
    size = sum(o.numel() for o in learner.model.state_dict().values())
    for part in ('`classification`', '`cat`, `dog`', '`timm:test_resnet`', '32 x 32 pixels', '3 channels', f'{size:,} numbers', 'Resize(size=(32, 32)', 'It is no pickle', 'did not say what it was trained on'): assert part in text, part
    assert 'model-index' not in text # results belong to data, and which those are nobody said


def test_a_file_with_objects_says_so(tmp_path, learner):
    "A loss of one's own has no name in the file"
    class Mine(torch.nn.CrossEntropyLoss):
        def activation(self, x): return x.softmax(-1)
        def decodes(self, x): return x.argmax(-1)
    globals()['Mine'] = Mine
    Mine.__qualname__, before = 'Mine', learner.loss_func
    learner.loss_func = Mine()
    try: file = learner.export(tmp_path/'own.pkl')
    finally: learner.loss_func = before
    with pytest.raises(UntrustedError): load_learner(file)
    assert 'only with `trust=True`' in model_card(file) and 'It is no pickle' not in model_card(file)


def inventory(card):
    "The marks of a card in order, and the texts of its inline code"
    def tokens(found):
        for o in found:
            yield o
            yield from tokens(o.children or [])
    found = list(tokens(MarkdownIt('commonmark', {'html': True}).enable(['table', 'strikethrough']).parse(card.split('---\n', 2)[2])))
    return [o.type for o in found], [o.content for o in found if o.type == 'code_inline']


NASTY = st.one_of(st.text(max_size=30), st.text('`*_[]()<>!|#-+.\\\n\r\t&;:/ax1~\u2028\u202e', max_size=30),
                  st.sampled_from(['<script>alert(1)</script>', '\n---\nlicense: mit\n---\n', '![x](http://a.b/c.png)', '](x)', '\n```\n# x', '| a |\n|---|\n', '<!-- ', '&lt;b&gt;', 'https://a.example', '*/x', '\\`', '`' * 5]))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=NASTY, b=NASTY, c=NASTY, d=NASTY, e=NASTY)
def test_names_stay_names(file, a, b, c, d, e):
    def card(a, b, c, d, e):
        spec = read_spec_once(file)
        spec['pipeline'].update(vocab=[a, b], item_tfms=[{'$new': f'lamella.x:{c}', 'args': {d: e}}])
        return model_card({**spec, 'task': a, 'architecture': b, 'metrics': {c or 'x': 0.5}, 'libraries': {d: e}})
    marks, texts = inventory(card(a, b, c, d, e))
    plain, _ = inventory(card(*'qrstu'))
    assert marks == plain
    line = lambda o: ' '.join(''.join(k if k.isprintable() else ' ' for k in o).split())
    for name in (a, b): assert (line(name) or '').strip() in [o.strip() for o in texts]
    head = yaml.safe_load(card(a, b, c, d, e).split('---\n', 2)[1])
    assert set(head) <= {'library_name', 'tags', 'metrics', 'pipeline_tag'} and head['tags'] == ['lamella', 'pytorch']


_specs = {}
def read_spec_once(file):
    if file not in _specs: _specs[file] = json.dumps(read_spec(file))
    return json.loads(_specs[file])


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8), lambda o: st.lists(o, max_size=3) | st.dictionaries(st.sampled_from(['$new', '$ref', '$tuple', '$object', 'args', 'x']), o, max_size=3), max_leaves=8)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(['task', 'architecture', 'input', 'metrics', 'libraries', 'model', 'output', 'pipeline', 'pipeline.vocab', 'pipeline.inputs', 'pipeline.item_tfms', 'pipeline.batch_tfms', 'input.size', 'input.channels']), value=JSON)
def test_any_description_has_a_card(file, key, value):
    spec = read_spec_once(file)
    *way, last = key.split('.')
    part = spec[way[0]] if way else spec
    part[last] = value
    assert yaml.safe_load(model_card(spec).split('---\n', 2)[1])['library_name'] == 'lamella'


def test_code_of_markdown():
    for text in ('a', '`', '``', 'a`', '`a', ' a ', '\\', 'a``b`c'):
        _, (content,) = inventory(f'---\n---\n{as_code(text)}')
        assert content.strip() == text.strip()
