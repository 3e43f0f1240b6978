"""Every scorer by its name. Imports nothing, so that command lines can tell of them at once."""

SCORERS = {
    "digits": "tempflow.digits.scorers:DigitsReward",
    "digits_gold": "tempflow.digits.scorers:DigitsGold",
    "scenes": "tempflow.scenes.scorers:ScenesReward",
    "scenes_gold": "tempflow.scenes.scorers:ScenesGold",
    "pickscore": "tempflow.rewards.scorers.pickscore:PickScore",
    "clipscore": "tempflow.rewards.scorers.clipscore:ClipScore",
    "hpsv2": "tempflow.rewards.scorers.hpsv2:HpsV2",
    "hpsv3": "tempflow.rewards.scorers.hpsv3:HpsV3",
    "imagereward": "tempflow.rewards.scorers.imagereward:ImageReward",
    "aesthetic": "tempflow.rewards.scorers.aesthetic:Aesthetic",
    "jpeg_compressibility": "tempflow.rewards.scorers.jpeg:compressibility",
    "jpeg_incompressibility": "tempflow.rewards.scorers.jpeg:incompressibility",
    "ocr": "tempflow.rewards.scorers.ocr:Ocr",
    "geneval": "tempflow.rewards.geneval.scorer:GenEval",
    "vlm_judge": "tempflow.rewards.scorers.vlm_judge:VlmJudge",
}
"""name -> `module:attribute`; a class is called with its options, and with a `device` if it takes one, to make the
scorer."""
