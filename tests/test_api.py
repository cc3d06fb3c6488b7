"""fastai's names and arguments: what programs call exists here, takes the same arguments, and in the same order."""
import inspect

import pytest

import lamella.vision.all as door

# The arguments of fastai 2.8.12, read from its signatures.
FASTAI = {
    'DataBlock': 'blocks dl_type getters n_inp item_tfms batch_tfms get_items splitter get_y get_x'.split(),
    'DataBlock.dataloaders': 'source path verbose'.split(),
    'DataBlock.summary': 'source bs show_batch'.split(),
    'DataBlock.datasets': 'source verbose'.split(),
    'Learner': 'dls model loss_func opt_func lr splitter cbs metrics path model_dir wd wd_bn_bias train_bn moms default_cbs'.split(),
    'Learner.fit': 'n_epoch lr wd cbs reset_opt start_epoch'.split(),
    'Learner.fit_one_cycle': 'n_epoch lr_max div div_final pct_start wd moms cbs reset_opt start_epoch'.split(),
    'Learner.fine_tune': 'epochs base_lr freeze_epochs lr_mult pct_start div lr_max div_final wd moms cbs reset_opt start_epoch'.split(),
    'Learner.lr_find': 'start_lr end_lr num_it stop_div show_plot suggest_funcs'.split(),
    'Learner.validate': 'ds_idx dl cbs'.split(),
    'Learner.get_preds': 'ds_idx dl with_input with_decoded with_loss act inner reorder cbs save_preds save_targs with_preds with_targs concat_dim pickle_protocol'.split(),
    'Learner.predict': 'item rm_type_tfms with_input'.split(),
    'Learner.show_results': 'ds_idx dl max_n shuffle'.split(),
    'Learner.save': 'file with_opt pickle_protocol'.split(),
    'Learner.load': 'file device with_opt strict'.split(),
    'Learner.export': 'fname pickle_module pickle_protocol'.split(),
    'vision_learner': 'dls arch normalize n_out pretrained weights loss_func opt_func lr splitter cbs metrics path model_dir wd wd_bn_bias train_bn moms cut init custom_head concat_pool pool lin_ftrs ps first_bn bn_final lin_first y_range n_in'.split(),
    'aug_transforms': 'mult do_flip flip_vert max_rotate min_zoom max_zoom max_lighting max_warp p_affine p_lighting xtra_tfms size mode pad_mode align_corners batch min_scale'.split(),
    'Resize': 'size method pad_mode resamples p nm before_call'.split(),
    'RandomResizedCrop': 'size min_scale ratio resamples val_xtra max_scale p nm before_call'.split(),
    'RandomSplitter': 'valid_pct seed'.split(),
    'GrandparentSplitter': 'train_name valid_name'.split(),
    'get_image_files': 'path recurse folders'.split(),
    'get_files': 'path extensions recurse folders followlinks'.split(),
    'CategoryBlock': 'vocab sort add_na'.split(),
    'RegressionBlock': 'n_out'.split(),
    'ImageBlock': ''.split(),
    'TransformBlock': 'type_tfms item_tfms batch_tfms dl_type dls_kwargs'.split(),
    'RegexLabeller': 'pat match'.split(),
    'ColReader': 'cols pref suff label_delim'.split(),
    'untar_data': 'url archive data c_key force_download base'.split(),
    'Adam': 'params lr mom sqr_mom eps wd decouple_wd'.split(),
    'SGD': 'params lr mom wd decouple_wd'.split(),
    'RMSProp': 'params lr mom sqr_mom eps wd decouple_wd'.split(),
    'Recorder': 'add_time train_metrics valid_metrics beta'.split(),
    'create_head': 'nf n_out lin_ftrs ps pool concat_pool first_bn bn_final lin_first y_range'.split(),
    'accuracy': 'inp targ axis'.split(),
    'top_k_accuracy': 'inp targ k axis'.split(),
    'CrossEntropyLossFlat': 'axis weight ignore_index reduction flatten floatify is_2d'.split(),
    'set_seed': 's reproducible'.split(),
    'Normalize.from_stats': 'mean std dim ndim cuda'.split(),
    'Flip': 'p draw size mode pad_mode align_corners batch'.split(),
    'Rotate': 'max_deg p draw size mode pad_mode align_corners batch'.split(),
    'Zoom': 'min_zoom max_zoom p draw draw_x draw_y size mode pad_mode batch align_corners'.split(),
    'Warp': 'magnitude p draw_x draw_y size mode pad_mode batch align_corners'.split(),
    'Brightness': 'max_lighting p draw batch'.split(),
    'Contrast': 'max_lighting p draw batch'.split(),
    'ImageDataLoaders.from_folder': 'path train valid valid_pct seed vocab item_tfms batch_tfms img_cls bs val_bs shuffle device'.split(),
    'ImageDataLoaders.from_name_func': 'path fnames label_func valid_pct seed item_tfms batch_tfms img_cls bs val_bs shuffle device'.split(),
    'ImageDataLoaders.from_df': 'df path valid_pct seed fn_col folder suff label_col label_delim y_block valid_col item_tfms batch_tfms img_cls bs val_bs shuffle device'.split(),
    'ClassificationInterpretation.plot_confusion_matrix': 'normalize title cmap norm_dec plot_txt'.split(),
    'ClassificationInterpretation.from_learner': 'learn ds_idx dl act'.split(),
    'ClassificationInterpretation.plot_top_losses': 'k largest'.split(),
    'load_learner': 'fname cpu pickle_module'.split(),
    'MaskBlock': 'codes'.split(),
    'BBoxLblBlock': 'vocab add_na'.split(),
    'MultiCategoryBlock': 'encoded vocab add_na'.split(),
    'MultiCategorize': 'vocab add_na'.split(),
    'OneHotEncode': 'c'.split(),
    'EncodedMultiCategorize': 'vocab'.split(),
    'TrainTestSplitter': 'test_size random_state stratify train_size shuffle'.split(),
    'RandomSubsetSplitter': 'train_sz valid_sz seed'.split(),
    'IndexSplitter': 'valid_idx'.split(),
    'EndSplitter': 'valid_pct valid_last'.split(),
    'ColSplitter': 'col on'.split(),
    'FileSplitter': 'fname'.split(),
    'RandomCrop': 'size'.split(),
    'CropPad': 'size pad_mode'.split(),
    'RatioResize': 'max_sz resamples'.split(),
    'FlipItem': 'p'.split(),
    'DihedralItem': 'p'.split(),
    'DeterministicFlip': 'size mode pad_mode align_corners'.split(),
    'DeterministicDihedral': 'size mode pad_mode align_corners'.split(),
    'Dihedral': 'p draw size mode pad_mode batch align_corners'.split(),
    'Saturation': 'max_lighting p draw batch'.split(),
    'Hue': 'max_hue p draw batch'.split(),
    'RandomErasing': 'p sl sh min_aspect max_count'.split(),
    'RandomResizedCropGPU': 'size min_scale ratio mode valid_scale max_scale mode_mask'.split(),
    'AffineCoordTfm': 'aff_fs coord_fs size mode pad_mode mode_mask align_corners'.split(),
    'PointScaler': 'do_scale y_first'.split(),
    'AddMaskCodes': 'codes'.split(),
    'bb_pad': 'samples pad_idx'.split(),
    'clip_remove_empty': 'bbox label'.split(),
    'get_annotations': 'fname prefix'.split(),
    'verify_images': 'fns'.split(),
    'resize_image': 'file dest src max_size n_channels ext img_format resample resume'.split(),
    'resize_images': 'path max_workers max_size recurse dest n_channels ext img_format resample resume'.split(),
    'download_images': 'dest url_file urls max_pics n_workers timeout preserve_filename'.split(),
    'SegmentationDataLoaders.from_label_func': 'path fnames label_func valid_pct seed codes item_tfms batch_tfms img_cls bs val_bs shuffle device'.split(),
    'Datasets.weighted_dataloaders': 'wgts bs'.split(),
    'Datasets.partial_dataloaders': 'partial_n bs'.split(),
    'Datasets.dataloaders': 'bs shuffle_train shuffle val_shuffle n path dl_type dl_kwargs device drop_last val_bs'.split(),
    'DataBlock.weighted_dataloaders': 'source wgts bs'.split(),
    'DataLoaders.test_dl': 'test_items with_labels bs num_workers'.split(),
    'TfmdDL': 'dataset bs shuffle num_workers pin_memory timeout batch_size drop_last indexed n device persistent_workers wif after_item before_batch after_batch'.split(),
    'accuracy_multi': 'inp targ thresh sigmoid'.split(),
    'combined_cos': 'pct start middle end'.split(),
    'Recorder.plot_loss': 'skip_start with_valid log show_epochs ax'.split(),
}

# What lamella does not take, and why; `coming_from_fastai.ipynb` lists the departures.
NOT_TAKEN = {
    'Learner.fine_tune': {'lr_max': 'base_lr decides it'},
    'Learner.get_preds': {o: 'not yet' for o in ('inner', 'reorder', 'save_preds', 'save_targs', 'with_preds', 'with_targs', 'concat_dim', 'pickle_protocol')},
    'Learner.predict': {'rm_type_tfms': 'found from the item'},
    'Learner.save': {'pickle_protocol': 'PyTorch decides it'},
    'Learner.export': {o: 'an export is no pickle' for o in ('pickle_module', 'pickle_protocol')},
    'load_learner': {'pickle_module': 'an export is no pickle'},
    'CrossEntropyLossFlat': {o: 'always done' for o in ('flatten', 'floatify', 'is_2d')},
    **{name: {o: 'fixed' for o in ('p', 'nm', 'before_call')} for name in ('Resize', 'RandomResizedCrop')},
}
# Arguments of the loaders that are passed on by `**kwargs`.
PASSED_ON = {'num_workers', 'bs', 'val_bs', 'shuffle', 'device', 'valid_pct', 'seed', 'item_tfms', 'batch_tfms', 'img_cls'}


def parameters(name: str) -> list[str]:
    found = door
    for part in name.split('.'): found = getattr(found, part)
    return [o for o in inspect.signature(found).parameters.values() if o.name != 'self']


@pytest.mark.parametrize('name', FASTAI)
def test_arguments(name):
    ours = parameters(name)
    names = [o.name for o in ours if o.kind not in (o.VAR_POSITIONAL, o.VAR_KEYWORD)]
    passes_on = PASSED_ON if any(o.kind is o.VAR_KEYWORD for o in ours) else set()
    missing = [o for o in FASTAI[name] if o not in names and o not in NOT_TAKEN.get(name, ()) and o not in passes_on]
    assert not missing, f'{name} does not take {missing}'


@pytest.mark.parametrize('name', [o for o in FASTAI if o not in ('vision_learner', 'load_learner')])
def test_order(name):
    "The first three arguments stand in fastai's order: those are given without their names"
    ours = [o.name for o in parameters(name)]
    theirs = [o for o in FASTAI[name][:3] if o not in NOT_TAKEN.get(name, ())]
    both = [o for o in ours if o in theirs]
    assert both == [o for o in theirs if o in both]


def test_every_name_of_the_door_exists():
    assert [o for o in door.__all__ if not hasattr(door, o)] == []
