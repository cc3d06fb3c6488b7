"""What goes wrong for users: the message names the thing and the way out, and nothing is lost."""
import warnings

import pytest
import torch

from conftest import make_photos
from lamella.vision.all import (Callback, CategoryBlock, DataBlock, DataError, ImageBlock, ImageDataLoaders, Learner, RandomSplitter, Resize, error_rate,
                                get_image_files, load_learner, parent_label, resnet18, vision_learner)


def loaders(path, get_y=parent_label, item_tfms=Resize(32), **kwargs):
    block = DataBlock(get_items=get_image_files, get_y=get_y, blocks=(ImageBlock, CategoryBlock), splitter=RandomSplitter(seed=1), item_tfms=item_tfms)
    return block.dataloaders(path, **{'bs': 4, 'num_workers': 0, 'device': 'cpu', **kwargs})


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="there are no items in .*get_items=get_image_files found nothing"): loaders(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder'): loaders(tmp_path/'photo')


def test_one_class(tmp_path):
    with pytest.raises(DataError, match='at least two classes'): loaders(make_photos(tmp_path, ['cat']))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_that_is_no_image(photos, workers):
    (photos/'cat'/'notes.jpg').write_text('not an image')
    with pytest.raises(DataError) as caught:
        dls = loaders(photos, num_workers=workers)
        for dl in dls: list(dl)
    assert 'notes.jpg' in str(caught.value) and 'verify_images' in str(caught.value)
    assert caught.value.__cause__ is not None


def test_different_sizes(photos):
    make_photos(photos, n=9, size=(40, 40))
    make_photos(photos, n=4, size=(80, 40))
    with pytest.raises(DataError, match=r'(?s)different shapes.*\.jpg.*Resize'): loaders(photos, item_tfms=None)


def test_label_function_fails(photos):
    def label(path):
        if path.name == '3.jpg': raise KeyError('three')
        return path.parent.name
    with pytest.raises(DataError, match=r'(?s)3\.jpg.*label.*KeyError') as caught: loaders(photos, label)
    assert isinstance(caught.value.__cause__.__cause__ or caught.value.__cause__, (KeyError, DataError))


def test_label_is_none(photos):
    with pytest.raises(DataError, match=r'3\.jpg.* has no label'): loaders(photos, lambda o: None if o.name == '3.jpg' else o.parent.name)


def test_validation_label_unknown(tmp_path):
    make_photos(tmp_path/'train', ['cat', 'dog'])
    make_photos(tmp_path/'valid', ['cat', 'dogg'])
    with pytest.raises(DataError, match=r"(?s)valid.dogg.*'dogg' is not among the 2 classes.*Did you mean 'dog'"):
        ImageDataLoaders.from_folder(tmp_path, item_tfms=Resize(32), num_workers=0)


@pytest.mark.parametrize('call, right', [
    (lambda dls: vision_learner(dls, resnet18, metric=error_rate), 'metrics'),
    (lambda dls: vision_learner(dls, 'resnet26dd'), 'resnet26d'),
    (lambda dls: vision_learner(dls, 'torchvision:resnet343'), 'resnet34'),
    (lambda dls: Learner(dls, torch.nn.Linear(1, 1), callbacks=[]), 'cbs'),
    (lambda dls: DataBlock(get_item=get_image_files), 'get_items'),
])
def test_misspelt(photos, call, right):
    with pytest.raises((TypeError, ValueError), match=right): call(loaders(photos))


def test_misspelt_event():
    with pytest.raises(AttributeError, match="Did you mean 'before_epoch'"):
        class Wrong(Callback):
            def befor_epoch(self): pass
            def before_epoche(self): pass


def test_no_network_for_weights(photos, monkeypatch, tmp_path):
    "One line that says what to do, for both libraries"
    import socket
    def refuse(*args, **kwargs): raise OSError('Network is unreachable')
    monkeypatch.setattr(socket, 'create_connection', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for arch in (resnet18, 'resnet10t.c3_in1k'):
        with pytest.raises(ConnectionError) as caught: vision_learner(loaders(photos), arch)
        message = str(caught.value)
        assert "weights='...'" in message and 'pretrained=False' in message and '\n' not in message


def test_weights_that_do_not_fit(photos, tmp_path):
    state = resnet18().state_dict()
    state['layer1.0.conv1.weight'] = torch.zeros(1)
    state['strange'] = torch.zeros(1)
    torch.save(state, tmp_path/'weights.pth')
    with pytest.warns(UserWarning, match=r"1 unexpected: strange; 1 mismatched: layer1.0.conv1.weight \(1,\) for \(64, 64, 3, 3\)"):
        learn = vision_learner(loaders(photos), resnet18, weights=tmp_path/'weights.pth')
    assert torch.equal(learn.model[0][0].weight, state['conv1.weight'])


def test_weights_that_fit_say_nothing(photos):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        vision_learner(loaders(photos), resnet18, weights=resnet18().state_dict())


def test_ctrl_c_leaves_a_usable_learner(photos):
    class CtrlC(Callback):
        def after_backward(self):
            if self.learn.train_iter == 1: raise KeyboardInterrupt
    learn = vision_learner(loaders(photos), 'test_resnet', pretrained=False, metrics=error_rate)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=CtrlC)
    assert len(learn.cbs) == 2 and learn.predict(photos/'cat'/'1.jpg').label in ('cat', 'dog')
    learn.fit(1)
    assert len(learn.recorder.values) == 1


def test_failed_export_changes_nothing(photos, tmp_path):
    learn = vision_learner(loaders(photos, item_tfms=[Resize(32), lambda im: im]), 'test_resnet', pretrained=False)
    with pytest.raises(TypeError, match='@register'): learn.export(tmp_path/'model.pkl')
    assert not list(tmp_path.glob('model*')) and not list(tmp_path.glob('.model*'))
    assert learn.predict(photos/'cat'/'1.jpg').label in ('cat', 'dog')


def test_item_that_is_no_image_in_predict(photos, tmp_path):
    learn = vision_learner(loaders(photos), 'test_resnet', pretrained=False)
    learn.export(tmp_path/'model.pkl')
    for predictor in (learn, load_learner(tmp_path/'model.pkl')):
        with pytest.raises(DataError, match='nothing.jpg'): predictor.predict(photos/'nothing.jpg')
