"""GenEval: its rules on made-up detections, and the whole way through a small random Mask2Former and CLIP."""

import pytest
import torch
from reward_cases import clip_folder, open_clip_tensors, pictures
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from tempflow.common.errors import BadInput
from tempflow.prompts import Prompt
from tempflow.rewards.geneval import detection
from tempflow.rewards.geneval.detection import CLASSES, COLOURS, Detector, box_of, cut_out
from tempflow.rewards.geneval.rules import Detection, benchmark, check_metadata, graded, kept, relations, strict
from tempflow.rewards.scorer import load_scorer

CENTRE = (40, 40, 60, 60)
LEFT, RIGHT, ABOVE, BELOW = (0, 40, 20, 60), (80, 40, 100, 60), (40, 0, 60, 20), (40, 80, 60, 100)


def thing(name, box=CENTRE, confidence=0.95, colour="red"):
    """A detection whose mask says its colour, for `painted`."""
    return Detection(name, confidence, box, torch.tensor(COLOURS.index(colour)))


def painted(objects, name):
    return [COLOURS[int(found.mask)] for found in objects]


def judged(detections, include, exclude=(), tag="two_object"):
    """(graded, strict, benchmark) of detections."""
    metadata = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    found = kept(detections, tag)
    return graded(found, painted, metadata), strict(found, painted, metadata), benchmark(found, painted, metadata)


def ask(name, count=1, **more):
    return {"class": name, "count": count, **more}


def test_single_object():
    assert judged([thing("dog")], [ask("dog")]) == (1, 1, 1)
    assert judged([thing("cat")], [ask("dog")]) == (0, 0, 0)
    assert judged([], [ask("dog")]) == (0, 0, 0)


def test_two_objects_earn_half_each():
    assert judged([thing("dog"), thing("cup")], [ask("dog"), ask("cup")]) == (1, 1, 1)
    assert judged([thing("dog")], [ask("dog"), ask("cup")]) == (0.5, 0, 0)


@pytest.mark.parametrize(("found", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (9, -1)])
def test_counting(found, score):
    """Three dogs, and not four: the layout of GenEval's counting prompts."""
    result = judged([thing("dog")] * found, [ask("dog", 3)], [ask("dog", 4)], tag="counting")
    assert result == (pytest.approx(score), found == 3, found == 3)


def test_benchmark_asks_for_at_least_the_count_where_nothing_is_excluded():
    assert judged([thing("dog")] * 3, [ask("dog", 2)]) == (0.5, 0, 1)


def test_confidence():
    """Counting needs 0.9, the rest 0.3; strictly more."""
    assert judged([thing("dog", confidence=0.31)], [ask("dog")])[2] == 1
    assert judged([thing("dog", confidence=0.3)], [ask("dog")])[2] == 0
    assert judged([thing("dog", confidence=0.89)], [ask("dog")], tag="counting")[2] == 0
    assert judged([thing("dog", confidence=0.91)], [ask("dog")], tag="counting")[2] == 1
    assert len(kept([thing("dog")] * 20, "")["dog"]) == 16


def test_colours():
    red = [ask("cup", color="red")]
    assert judged([thing("cup")], red) == (1, 1, 1)
    assert judged([thing("cup", colour="blue")], red) == (0.5, 0, 0)
    assert judged([thing("dog")], red) == (0, 0, 0)  # no cup: neither count nor colour
    two = [ask("cup", 2, color="red")]
    assert judged([thing("cup")], two) == (0.25, 0, 0)  # half the count, and so nothing for the colour
    assert judged([thing("cup"), thing("cup", colour="blue")], two) == (0.75, 0, 0)


def test_benchmark_looks_at_the_most_confident_only():
    cups = [thing("cup", confidence=0.5), thing("cup", confidence=0.8, colour="blue")]
    assert judged(cups, [ask("cup", color="blue")])[2] == 1
    assert judged(cups, [ask("cup", color="red")])[2] == 0


def test_attribute_binding():
    """A red cup and a blue dog are not a blue cup and a red dog."""
    include = [ask("cup", color="red"), ask("dog", color="blue")]
    assert judged([thing("cup"), thing("dog", colour="blue")], include) == (1, 1, 1)
    assert judged([thing("cup", colour="blue"), thing("dog")], include) == (0.5, 0, 0)


@pytest.mark.parametrize(("box", "named"), [(LEFT, {"left of"}), (RIGHT, {"right of"}), (ABOVE, {"above"}),
                                            (BELOW, {"below"}), (CENTRE, set()), ((0, 0, 20, 20), {"left of", "above"}),
                                            ((42, 41, 62, 61), set()), ((47, 40, 67, 60), set()),
                                            ((49, 40, 69, 60), {"right of"}), ((36, 80, 56, 100), {"below"}),
                                            ((-20, 26, 0, 46), {"left of"}), ((100, 54, 120, 74), {"right of"}),
                                            ((26, -20, 46, 0), {"above"}), ((54, 100, 74, 120), {"below"})])
def test_relations(box, named):
    """All sides are 20, so 4 of a distance do not count: of 7 there are 3 left, too little, of 9 there are 5."""
    assert relations(box, CENTRE) == named


def test_positions():
    include = [ask("dog"), ask("cup", position=["left of", 0])]
    assert judged([thing("dog"), thing("cup", LEFT)], include) == (1, 1, 1)
    assert judged([thing("dog"), thing("cup", RIGHT)], include) == (pytest.approx(2 / 3), 0, 0)
    assert judged([thing("cup", LEFT)], include) == (pytest.approx(1 / 3), 0, 0)  # nothing to be left of
    assert judged([thing("dog")], include) == (pytest.approx(1 / 3), 0, 0)
    two = [thing("dog"), thing("cup", LEFT), thing("cup", RIGHT)]
    assert judged(two, [ask("dog"), ask("cup", 2, position=["left of", 0])])[1:] == (0, 0)  # all must stand there


@pytest.mark.parametrize("boxes", [(CENTRE, LEFT), (LEFT, CENTRE)], ids=["first right", "second right"])
def test_an_object_must_stand_so_from_all_of_its_targets(boxes):
    """A cup between two dogs is left of one of them only, whichever the detector is surer of."""
    dogs = [thing("dog", box, confidence) for box, confidence in zip(boxes, (0.95, 0.5), strict=True)]
    include = [ask("dog", 2), ask("cup", position=["left of", 0])]
    assert judged([*dogs, thing("cup", (21, 40, 39, 60))], include) == (pytest.approx(2 / 3), 0, 0)
    assert judged([*dogs, thing("cup", (-40, 40, -20, 60))], include) == (1, 1, 1)


def test_position_needs_a_target_of_the_right_colour():
    include = [ask("dog", color="white"), ask("cup", position=["above", 0])]
    assert judged([thing("dog", colour="black"), thing("cup", ABOVE)], include) == (pytest.approx(3 / 4 - 1 / 4), 0, 0)
    assert judged([thing("dog", colour="white"), thing("cup", ABOVE)], include) == (1, 1, 1)


def test_excluded_classes():
    """Beyond GenEval's own files: a class that is only excluded is a term of its own."""
    include, exclude = [ask("dog")], [ask("cat", 1)]
    assert judged([thing("dog")], include, exclude) == (1, 1, 1)
    assert judged([thing("dog"), thing("cat")], include, exclude) == (0.5, 0, 0)


@pytest.mark.parametrize(("metadata", "words"), [
    ({}, r'prompt "a dog" has include=None; give GenEval metadata'),
    ({"include": [ask("dgo")]}, "class must be one that the detector knows: person, bicycle"),
    ({"include": [ask("dog", 0)]}, "count must be a whole number from 1"),
    ({"include": [ask("dog", color="crimson")]}, "color must be one of red, orange"),
    ({"include": [ask("dog", position=["left of", 0])]}, "position must be"),
    ({"include": [ask("dog"), ask("cup", position=["beside", 0])]}, "position must be"),
    ({"include": [ask("dog"), ask("cup", position=["above", 1])]}, "number of an earlier clause"),
])  # fmt: skip
def test_wrong_metadata_are_named(metadata, words):
    with pytest.raises(ValueError, match=words):
        check_metadata(Prompt("a dog", metadata), CLASSES)


def test_right_metadata_pass():
    include = [ask("dog", color="white"), ask("cup", 2, position=["above", 0])]
    check_metadata(Prompt("x", {"tag": "position", "include": include, "exclude": [ask("cup", 3)]}), CLASSES)


def test_objects_are_cut_out_before_grey():
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    assert box_of(mask) == (2, 1, 5, 4)
    part = cut_out(image, Detection("dog", 1.0, box_of(mask), mask))
    assert part.shape == (3, 3, 3) and part[:, 1, 1].tolist() == [153] * 3
    part[:, 1, 1] = image[:, 2, 3]
    assert torch.equal(part, image[:, 1:4, 2:5])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small random Mask2Former that is sure of what it sees, and a small random CLIP."""
    torch.manual_seed(0)
    swin = SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, image_size=64,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6, num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in model.class_predictor.parameters():
            parameter.normal_(0, 4)
        for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
            parameter.mul_(40)
    folder = tmp_path_factory.mktemp("geneval")
    model.save_pretrained(folder / "detector")
    return folder / "detector", clip_folder(folder / "clip", open_clip_tensors())


@pytest.fixture
def images(monkeypatch):
    """Seen at an eighth of the official size, for speed."""
    monkeypatch.setattr(detection, "SHORT", 96)
    monkeypatch.setattr(detection, "LONG", 168)
    return pictures(3, 96, 80)


def test_detector_follows_mmdetection(folders, images):
    """Each detection's confidence is class probability times mean mask probability inside the mask."""
    detector = Detector(folders[0], 2, "cpu")
    with torch.no_grad():
        found = detector(images)
        pixels, inside = detection.detector_pixels(images[:1])
        answer = detector.model(pixel_values=pixels)
    masks = torch.nn.functional.interpolate(answer.masks_queries_logits, pixels.shape[-2:], mode="bilinear")
    masks = torch.nn.functional.interpolate(masks[..., : inside[0], : inside[1]], (96, 80), mode="bilinear")[0]
    expected = {}
    for query, probabilities in enumerate(answer.class_queries_logits[0].softmax(-1)):
        filled = masks[query] > 0
        sure = masks[query][filled].sigmoid().mean().item() if filled.any() else 0.0
        for kind in range(80):
            if probabilities[kind] * sure > 0.1:
                expected[round(probabilities[kind].item() * sure, 4), CLASSES[kind]] = filled
    assert expected and len(found) == 3
    assert {(round(one.confidence, 4), one.name) for one in found[0]} == set(expected)
    for one in found[0]:
        assert torch.equal(one.mask, expected[round(one.confidence, 4), one.name])
        assert one.box == box_of(one.mask)


@pytest.mark.parametrize("score", ["graded", "strict", "geneval"])
def test_from_pictures_to_scores(folders, images, score):
    """The scores are those of the rules on what detector and colour reader say."""
    options = {"detector": folders[0], "clip": folders[1], "score": score, "rows": 2}
    scorer = load_scorer("reward.name", "geneval", 4, options)
    with torch.no_grad():
        seen = [max(found, key=lambda one: one.confidence) for found in scorer.function.detect(images)]
        colour = scorer.function.colours(images[0], seen[:1], seen[0].name)[0]
    other = next(name for name in COLOURS if name != colour)
    counts = [len(kept(found, "")[one.name]) for one, found in zip(seen, scorer.function.detect(images), strict=True)]
    include = [[ask(one.name, count)] for one, count in zip(seen, counts, strict=True)]
    prompts = [Prompt("it", {"tag": "colors", "include": clauses}) for clauses in include]
    assert scorer(images, prompts).tolist() == [1.0, 1.0, 1.0]
    absent = next(name for name in CLASSES if name not in {one.name for one in scorer.function.detect(images[:1])[0]})
    prompts = [
        Prompt("other", {"include": [*include[0], ask(absent)]}),
        Prompt("right", {"include": [ask(seen[0].name, counts[0])]}),
        Prompt("colour", {"include": [ask(seen[0].name, counts[0], color=other)]}),
    ]
    same = images[:1].expand(3, -1, -1, -1)
    scores = scorer(same, prompts)
    assert scores[0] == (0.5 if score == "graded" else 0) and scores[1] == 1 and scores[2] < 1
    with pytest.raises(BadInput, match='prompt "plain" has include=None'):
        scorer(same, [Prompt("plain")] * 3)
    with pytest.raises(BadInput, match='refuses a prompt: prompt "plain" has include=None'):
        scorer.check([*prompts, Prompt("plain")])


def test_unknown_score_is_refused(folders):
    with pytest.raises(BadInput, match=r"options\.geneval\.score=soft: choose one of graded, strict, geneval"):
        load_scorer("reward.name", "geneval", 4, {"score": "soft"})
