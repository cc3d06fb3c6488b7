"""What reviewers of exported files and of `predict` found, and does not come back."""
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from conftest import make_photos
from lamella.base.bundle import EXPORT_MEMBERS, read_bundle, write_bundle
from lamella.base.registry import printable, registered
from lamella.data.labels import ColReader
from lamella.data.pipeline import DataError
from lamella.data.several import several
from lamella.export import ExportError, load_learner
from lamella.export.card import model_card
from lamella.learner.predictions import Prediction, Predictions
from lamella.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, Resize, get_image_files, parent_label


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return get_image_files(make_photos(tmp_path_factory.mktemp('photos'), n=3))


@pytest.fixture(scope='module')
def learn(files, tmp_path_factory):
    dls = DataBlock(blocks=(ImageBlock, CategoryBlock), get_y=parent_label, item_tfms=Resize(8)).dataloaders(files, bs=2, num_workers=0, device='cpu')
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), path=tmp_path_factory.mktemp('learner'))


@pytest.fixture(scope='module')
def exported(learn): return learn.export('model.pkl')


def changed(exported, folder, change):
    "What somebody makes who knows the format"
    members = read_bundle(exported, EXPORT_MEMBERS)
    spec = json.loads(members['spec.json'])
    change(spec)
    return write_bundle(folder/'changed.pkl', {**members, 'spec.json': json.dumps(spec).encode()})


def new(name, **args): return {'$new': f'lamella.{name}', 'args': args}


# ---- exported files of an attacker

@pytest.mark.parametrize('step', [
    new('vision.transforms:Resize', size=40_000), new('vision.transforms:Resize', size={'$float': '40000'}), new('vision.transforms:Resize', size={'$float': 'nan'}), new('vision.transforms:CropPad', size={'$tuple': [8, 40_000]}),
    new('vision.transforms:RatioResize', max_sz=40_000), new('vision.transforms:RandomResizedCrop', size=8, val_xtra=1e6), new('vision.geometry:Flip', size={'$tensor': [40_000, 8], 'dtype': 'int64'}),
    new('vision.transforms:Resize', size={'$object': 0}), {'$new': 'lamella.vision.transforms:Resize', 'args': {'$object': 0}},
    new('data.transform:Transform', enc=new('vision.transforms:Resize', size=40_000))])
@pytest.mark.parametrize('place', ['item_tfms', 'batch_tfms'])
def test_images_that_would_fill_the_memory(step, place, exported, tmp_path):
    with pytest.raises(ExportError, match='without trust=True|hides the arguments'): load_learner(changed(exported, tmp_path, lambda spec: spec['pipeline'][place].insert(0, step)))


def test_large_images_are_for_files_that_are_trusted(exported, tmp_path):
    file = changed(exported, tmp_path, lambda spec: spec['pipeline']['item_tfms'].insert(0, new('vision.transforms:Resize', size=10_000)))
    with pytest.raises(ExportError, match='size=10000'): load_learner(file)
    assert load_learner(file, trust=True).pipeline.item_tfms.fs[0].size == (10_000, 10_000)


@pytest.mark.parametrize('item', [str, Path])
def test_a_file_does_not_choose_which_picture_is_opened(item, exported, files, tmp_path):
    secret = make_photos(tmp_path/'secret', classes=['x'], n=1)/'x'/'1.jpg'
    reader = new('data.labels:ColReader', cols=['drive' if item is Path else '__doc__'], pref=str(secret) if item is Path else '/')
    for step in new('data.transform:Transform', enc=reader), new('data.datablock:_Getter', func=reader):
        predictor = load_learner(changed(exported, tmp_path, lambda spec: spec['pipeline']['inputs'][0].insert(0, step)))
        with pytest.raises(DataError, match='a ColReader reads columns of a row'): predictor.predict(item(files[0]))


def test_readers_give_columns_and_nothing_of_the_machine():
    row = next(pd.DataFrame({'fname': ['a.jpg']}).itertuples())
    assert ColReader('fname', pref='x/')(row) == 'x/a.jpg' and ColReader('__a')({'__a': 1}) == 1
    with pytest.raises(AttributeError, match='__class__'): ColReader('__class__')(row)


@pytest.mark.parametrize('change', [lambda s: s.update(model={'builder': 'a\x1b[2J:b\n', 'args': {}}), lambda s: s.update(output={'$new': 'lamella.\x1b]0;x\x07:y'}), lambda s: s.update(output={'$ref': '\x1b[2Jx', 'method': '\x1b[0m'})])
def test_errors_about_files_do_not_steer_terminals(change, exported, tmp_path):
    with pytest.raises(ExportError) as caught: load_learner(changed(exported, tmp_path, change))
    error = caught.value
    while error is not None:
        assert str(error).isprintable(), error
        error = error.__cause__


def test_pickles_name_classes_without_steering_terminals():
    from lamella.base.pickling import UntrustedError, load_objects
    with pytest.raises(UntrustedError) as caught: load_objects(b'\x80\x04c\x1b[2J\nx\x1b\n.', [])
    assert str(caught.value).isprintable() and '\\x1b[2J' in str(caught.value)
    with pytest.raises(LookupError) as caught: registered('\x1b[2J')
    assert str(caught.value).isprintable()


def test_loading_leaves_the_random_states(exported, tmp_path, monkeypatch):
    import lamella.export.loading as loading
    def drawing(*args): return torch.rand(3) is not None and build(*args)
    build = loading._build_model
    monkeypatch.setattr(loading, '_build_model', drawing)
    before = torch.get_rng_state()
    load_learner(exported)
    assert torch.equal(torch.get_rng_state(), before)


# ---- tables and names

def test_a_table_of_many_classes_sorts_them_once_at_most(monkeypatch):
    n, calls = 3000, []
    monkeypatch.setattr(Prediction, 'probabilities', property(lambda self, found=Prediction.probabilities.fget: calls.append(1) or found(self)))
    one = Prediction.make('5', torch.tensor(5), torch.full((n,), 1 / n), [str(i) for i in range(n)], 'classification')
    table = Predictions([one], ['a.jpg']).to_frame()
    assert table.shape == (1, n + 3) and len(calls) <= 1 and table['2999'][0] == pytest.approx(1 / n)


def test_names_that_are_equal_as_text_stay_two_classes():
    one = Prediction.make(1, torch.tensor(0), torch.tensor([0.75, 0.25]), [1, '1'], 'classification')
    assert one.to_dict()['probabilities'] == {'1': 0.75, '1_': 0.25}
    assert list(Predictions([one]).to_frame().columns) == ['item', 'label', 'probability', 1, '1']


def test_predictions_show_names_without_steering_terminals():
    one = Prediction.make('\x1b[2Jcat\n', torch.tensor(0), torch.tensor([1.]), ['\x1b[2Jcat\n'], 'classification')
    assert repr(Predictions([one], ['a\x1b[0m.jpg'])) == '1 predictions: a\\x1b[0m.jpg \\x1b[2Jcat\\n 1.00'
    assert printable('caf\u00e9 \ud800') == 'caf\u00e9 \\ud800'


# ---- what people predict

def test_patterns_in_folders_with_brackets(files, tmp_path):
    folder = tmp_path/'run [2]'/'sub'
    folder.mkdir(parents=True)
    for name in ('a.jpg', 'b.jpg'): (folder/name).write_bytes(Path(files[0]).read_bytes())
    assert [Path(o).name for o in several(str(folder/'*.jpg'))] == ['a.jpg', 'b.jpg'] == [Path(o).name for o in several(str(tmp_path/'run [2]'/'*'/'?.jpg'))]
    with pytest.raises(FileNotFoundError): several(str(tmp_path/'run [3]'/'*.jpg'))


def test_a_loaded_file_takes_the_arguments_of_fastais_learner(exported, files):
    predictor = load_learner(exported)
    shown, *three = predictor.predict(files[0], with_input=True)
    assert shown.shape == (3, 8, 8) and three[0] == predictor.predict(files[0]).label and len(three) == 3
    with predictor.no_bar(), predictor.no_logging(): assert predictor.predict(files[0], rm_type_tfms=0).label == three[0]
    opened = predictor.pipeline.opened(files[0])[0]
    assert torch.equal(predictor.predict(opened, rm_type_tfms=1)[2], three[2])
    with pytest.raises(TypeError, match="Did you mean 'with_input'"): predictor.predict(files[0], with_inputs=True)


@pytest.mark.parametrize('model', ['learner', 'file'])
def test_arguments_that_cannot_be(model, learn, exported, files):
    p = learn if model == 'learner' else load_learner(exported)
    with pytest.raises(ValueError, match='with_input=True is for one item'): p.predict(files, with_input=True)
    for steps in 64, -1, ['x']:
        with pytest.raises(ValueError, match='rm_type_tfms=.*(1|2) transforms.*bs='): p.predict(files[0], rm_type_tfms=steps)


def test_files_in_place_of_a_loader(exported, files):
    for given in files, str(files[0]), [str(files[0])]:
        with pytest.raises(TypeError, match='takes a loader, not files'): load_learner(exported).get_preds(dl=given)


def test_the_card_says_which_folder_of_its_author_a_file_holds(exported, files, tmp_path):
    reader = new('data.datablock:_Getter', func=new('data.labels:ColReader', cols=['fname'], pref='/pictures/of/ann/'))
    file = changed(exported, tmp_path, lambda spec: spec['pipeline']['inputs'][0].insert(0, reader))
    assert 'names begin with `/pictures/of/ann/`' in model_card(file) and 'names begin with' not in model_card(exported)


def test_pixels_that_are_no_numbers_are_no_black_picture(exported):
    with pytest.raises(DataError, match='from nan to nan'): load_learner(exported).predict(torch.full((3, 8, 8), float('nan')))
