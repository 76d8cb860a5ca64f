"""Fine-tune an encoder in detectron2, on VOC07+12 or COCO, and print its AP: Table 4 of Barlow Twins

    python train.py --config-file voc_R_50_C4_24k.yaml --num-gpus 8 MODEL.WEIGHTS encoder_detectron2.pth

Needs detectron2 (https://github.com/facebookresearch/detectron2), and its datasets under $DETECTRON2_DATASETS. The file
of weights has detectron2's names: export_encoder(encoder, folder, formats="detectron2") writes it.
"""
import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    "The head of C4 detectors with one more normalisation after res5 (He et al. 2020, MoCo, appendix)"
    @classmethod
    def _build_res5_block(cls, cfg):
        blocks, channels = super()._build_res5_block(cfg)
        return nn.Sequential(*blocks, get_norm(cfg.MODEL.RESNETS.NORM, channels)), channels


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        if dataset_name.startswith("voc"): return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
