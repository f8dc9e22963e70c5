"""The entries of the table of tasks, by family."""

from __future__ import annotations

from mmfuse.eval.scorers import choices, objects, yesno
from mmfuse.eval.scorers.captions import captions
from mmfuse.eval.scorers.classes import ave, classification, music_avqa
from mmfuse.eval.scorers.documents import anls, chartqa
from mmfuse.eval.scorers.exact import exact_match
from mmfuse.eval.scorers.grounding import refcoco
from mmfuse.eval.scorers.ifeval import ifeval
from mmfuse.eval.scorers.judges import llava_bench, llava_prompt, mm_vet, mm_vet_prompt, template_prompt
from mmfuse.eval.scorers.mathvista import mathvista, mathvista_prompt
from mmfuse.eval.scorers.mmmu import mmmu
from mmfuse.eval.scorers.signals import events, retrieval
from mmfuse.eval.scorers.speech import asr
from mmfuse.eval.scorers.task import PROTOCOLS, Judge, TaskScorer
from mmfuse.eval.scorers.vqa import evalai_people, gqa, textvqa, vqav2

_ANY: tuple[TaskScorer, ...] = (
    TaskScorer(
        "exact_match",
        exact_match,
        "exact_match",
        optional=("category", "image", "cluster"),
        target="the right answer, or a list of them",
        data="any",
        licence="that of your data",
    ),
)

_IMAGE = ("image", "cluster", "category")

_SHORT_ANSWERS = (
    TaskScorer("vqav2", vqav2, "accuracy", (), (*_IMAGE, "answer_type"), PROTOCOLS, "ten answers",
        data="visualqa.org, images of COCO", licence="CC-BY-4.0 (annotations)", paper="1612.00837",
        aliases=("vqa_v2", "vqa")),
    TaskScorer("textvqa", textvqa, "accuracy", (), _IMAGE, PROTOCOLS, "ten answers",
        data="textvqa.org, images of Open Images", licence="CC-BY-4.0", paper="1904.08920", aliases=("textvqa_val",)),
    TaskScorer("vizwiz", evalai_people, "accuracy", (), (*_IMAGE, "answer_type"), PROTOCOLS, "ten answers",
        data="vizwiz.org", licence="CC-BY-4.0", paper="1802.08218", aliases=("vizwiz_vqa",)),
    TaskScorer("okvqa", evalai_people, "accuracy", (), _IMAGE, PROTOCOLS, "ten answers",
        data="okvqa.allenai.org, images of COCO", paper="1906.00067", aliases=("ok_vqa",)),
    TaskScorer("gqa", gqa, "accuracy", (), ("imageId", "types", "cluster"), PROTOCOLS, "the right answer",
        data="cs.stanford.edu/people/dorarad/gqa", licence="CC-BY-4.0", paper="1902.09506",
        aliases=("gqa_testdev_balanced",)),
    TaskScorer("docvqa", anls, "anls", (), (*_IMAGE, "docId", "answer_type"), (*PROTOCOLS, "paper"),
        "a list of answers", data="rrc.cvc.uab.es, challenge 17, after registration", paper="2007.00398",
        aliases=("docvqa_val",)),
    TaskScorer("infovqa", anls, "anls", (), (*_IMAGE, "answer_type"), (*PROTOCOLS, "paper"), "a list of answers",
        data="rrc.cvc.uab.es, challenge 17, after registration", paper="2104.12756", aliases=("infographicvqa",)),
    TaskScorer("stvqa", anls, "anls", (), _IMAGE, (*PROTOCOLS, "paper"), "a list of answers",
        data="rrc.cvc.uab.es, challenge 11, after registration", paper="1905.13648", aliases=("st_vqa",)),
    TaskScorer("chartqa", chartqa, "relaxed_accuracy", (), ("split", *_IMAGE), PROTOCOLS, "the right answer",
        data="github.com/vis-nlp/ChartQA", licence="GPL-3.0", paper="2203.10244", aliases=("chartqa_test",)),
)  # fmt: skip

_OPTIONS = ("options", "A, B, …", "image", "cluster", "category")
_HARNESSES = ("vlmevalkit", "lmms")

_MULTIPLE_CHOICE = (
    TaskScorer("multiple_choice", choices.multiple_choice, "accuracy", (), _OPTIONS,
        ("letter", "lmms", "vlmevalkit", "mmmu"), "a letter", data="any", licence="that of your data",
        aliases=("mcq",)),
    TaskScorer("mmbench", choices.mmbench, "circular_accuracy", (), ("index", "g_index", "l2-category", *_OPTIONS),
        PROTOCOLS, "a letter", data="github.com/open-compass/MMBench", licence="Apache-2.0 (annotations)",
        paper="2307.06281",
        aliases=("mmbench_dev_en", "mmbench_dev_cn", "mmbench_en_dev", "mmbench_cn_dev", "ccbench")),
    TaskScorer("seedbench", choices.seedbench, "accuracy", (), ("data_type", "question_type_id", *_OPTIONS), PROTOCOLS,
        "a letter", "text, or the losses of the options", data="huggingface.co/datasets/AILab-CVC/SEED-Bench",
        licence="CC-BY-NC-4.0", paper="2307.16125", aliases=("seed", "seed_bench", "seedbench_img", "seed_image")),
    TaskScorer("ai2d", choices.ai2d, "accuracy", (), _OPTIONS, _HARNESSES, "a letter",
        data="prior.allenai.org/projects/diagram-understanding", licence="CC-BY-SA-4.0", paper="1603.07396",
        aliases=("ai2d_test",)),
    TaskScorer("realworldqa", choices.realworldqa, "accuracy", (), _OPTIONS, _HARNESSES, "a letter, or the answer",
        data="huggingface.co/datasets/xai-org/RealworldQA", licence="CC-BY-ND-4.0"),
    TaskScorer("cv_bench", choices.cv_bench, "cv_bench", (), ("source", *_OPTIONS), PROTOCOLS, "a letter",
        data="huggingface.co/datasets/nyu-visionx/CV-Bench", licence="Apache-2.0", paper="2406.16860",
        aliases=("cvbench", "cv_bench_2d", "cv_bench_3d")),
    TaskScorer("mmstar", choices.mmstar, "accuracy", (), ("l2_category", *_OPTIONS), PROTOCOLS, "a letter",
        data="huggingface.co/datasets/Lin-Chen/MMStar", paper="2403.20330"),
    TaskScorer("scienceqa", choices.scienceqa, "accuracy", (), ("has_image", *_OPTIONS), PROTOCOLS, "a letter",
        data="scienceqa.github.io", licence="CC-BY-NC-SA-4.0", paper="2209.09513",
        aliases=("sqa", "scienceqa_img", "scienceqa_test")),
    TaskScorer("mmmu", mmmu, "accuracy", (), ("question_type", "subject", *_OPTIONS), (*PROTOCOLS, "strict"),
        "a letter, or the answer (or several) to an open question", data="huggingface.co/datasets/MMMU/MMMU",
        licence="Apache-2.0", paper="2311.16502", aliases=("mmmu_val", "mmmu_dev_val")),
    TaskScorer("mathvista", mathvista, "accuracy", ("question_type", "answer_type"),
        ("choices", "precision", "extraction", "task", "skills", "image", "cluster"), ("official", "rules"),
        "the answer, as text", data="huggingface.co/datasets/AI4Math/MathVista", licence="CC-BY-SA-4.0",
        paper="2310.02255", aliases=("mathvista_mini", "mathvista_testmini"),
        judge=Judge(mathvista_prompt,
            {"prompt": "the text of demo_prompt in evaluation/prompts/ext_ans.py of github.com/lupantech/MathVista"},
            "extraction", ("official",))),
    TaskScorer("mmvp", choices.mmvp, "pair_accuracy", (), ("pair", "index", *_OPTIONS), _HARNESSES, "a letter",
        data="huggingface.co/datasets/MMVP/MMVP", licence="MIT", paper="2401.06209"),
)  # fmt: skip

_YES_NO = (
    TaskScorer("pope", yesno.pope, "accuracy", (), ("category", "image", "cluster"), PROTOCOLS, "yes or no",
        data="github.com/RUCAIBox/POPE, images of COCO", licence="MIT (questions)", paper="2305.10355",
        aliases=("pope_random", "pope_popular", "pope_adversarial", "pope_adv", "pope_pop", "pope_full")),
    TaskScorer("mme", yesno.mme, "perception", ("category",), ("image", "question_id", "cluster"), PROTOCOLS,
        "yes or no", data="github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, on request",
        paper="2306.13394"),
    TaskScorer("hallusionbench", yesno.hallusionbench, "accuracy", (),
        ("judgement", "category", "subcategory", "set_id", "figure_id", "question_id", "index"),
        ("vlmevalkit", "official", "substitute"), "yes or no", data="github.com/tianyi-lab/HallusionBench",
        licence="BSD-3-Clause", paper="2310.14566", aliases=("hallusion_bench", "hallusion_bench_image"),
        judge=Judge(template_prompt,
            {"prompt": "the prompt of evaluate_by_chatgpt in utils.py of github.com/tianyi-lab/HallusionBench, with "
            "{question}, {gt_answer_details} and {prediction} where it puts them"})),
    TaskScorer("amber_discriminative", yesno.amber_discriminative, "accuracy", (), ("type", "image", "cluster"),
        ("official", "vlmevalkit"), "yes or no", data="github.com/junyangwang0410/AMBER", licence="Apache-2.0",
        paper="2311.07397", aliases=("amber_d",)),
)  # fmt: skip

_CAPTIONS = (
    TaskScorer("refcoco", refcoco, "accuracy", ("width", "height"), ("convention", "split", *_IMAGE),
        ("convention", "qwen_vl", "internvl", "lmms"), "[x1, y1, x2, y2] in pixels",
        data="github.com/lichengunc/refer, images of COCO", paper="1608.00272",
        aliases=("refcoco+", "refcoco_plus", "refcocog")),
    TaskScorer("coco_captions", captions, "cider", (), _IMAGE, ("python", "tokenized"), "a list of captions",
        data="cocodataset.org", licence="CC-BY-4.0", paper="1504.00325",
        aliases=("coco_cap", "coco_caption", "nocaps", "flickr30k", "textcaps")),
    TaskScorer("audio_captions", captions, "cider", (), ("image", "cluster"), ("python", "tokenized"),
        "a list of captions", data="Clotho: zenodo.org/records/4783391; AudioCaps: github.com/cdjkim/audiocaps",
        paper="1910.09387", aliases=("clotho", "audiocaps")),
    TaskScorer("chair", objects.chair, "chair_i", (), ("captions", "image", "cluster"), ("official", "corrected"),
        "the list of objects in the image",
        resources={"synonyms": "data/synonyms.txt of github.com/LisaAnne/Hallucination"},
        data="cocodataset.org, instances and captions of 2014", licence="CC-BY-4.0 (annotations)", paper="1809.02156"),
    TaskScorer("amber_generative", objects.amber_generative, "chair", (), ("image", "cluster"), ("exact_words",),
        "the annotation, an object with `truth` and `hallu`",
        resources={
            "relation": "data/relation.json of github.com/junyangwang0410/AMBER",
            "safe_words": "data/safe_words.txt of github.com/junyangwang0410/AMBER",
        },
        data="github.com/junyangwang0410/AMBER", licence="Apache-2.0", paper="2311.07397", aliases=("amber_g",)),
)  # fmt: skip

_SIGNALS = (
    TaskScorer("ifeval", ifeval, "prompt_level_strict_acc", ("instruction_id_list", "kwargs"), ("cluster",),
        ("official",), "nothing", data="huggingface.co/datasets/google/IFEval", licence="Apache-2.0",
        paper="2311.07911"),
    TaskScorer("asr", asr, "wer", (), ("speaker", "split", "cluster"),
        ("whisper_no_spelling", "whisper", "whisper_basic", "plain"), "the transcript", takes_resources=True,
        data="openslr.org/12 (LibriSpeech), or any", licence="CC-BY-4.0 (LibriSpeech)", paper="2212.04356",
        aliases=("wer", "librispeech", "librispeech_test_clean", "librispeech_test_other")),
    TaskScorer("classification", classification, "accuracy", (),
        ("classes", "modality", "score", "subject", "video", "cluster"), ("official",), "a class",
        "a class, or scores of the classes", data="CREMA-D, Kinetics-Sounds, VGGSound, AVE, EEG sets, or any",
        licence="that of your data",
        aliases=("crema_d", "kinetics_sounds", "vggsound", "av_classification", "eeg_classification", "seed_emotion")),
    TaskScorer("ave", ave, "segment_accuracy", (), ("video", "cluster"), ("official",), "a class for each second",
        "a class for each second", data="sites.google.com/view/audiovisualresearch", paper="1803.08842",
        aliases=("ave_localization",)),
    TaskScorer("music_avqa", music_avqa, "accuracy", (), ("type", "video_id", "cluster"), ("official", "generation"),
        "the answer, one of 42 words", data="gewu-lab.github.io/MUSIC-AVQA", paper="2203.14072"),
    TaskScorer("eeg_retrieval", retrieval, "top1", (), ("subject", "cluster"), ("official",),
        "the number of the right candidate", "the similarity to each candidate",
        data="osf.io/3jk45 (THINGS-EEG2)", licence="CC-BY-4.0", paper="2308.13234", aliases=("things_eeg",)),
    TaskScorer("events", events, "f1", ("duration",), ("subject", "cluster"), ("official",), "[start, end] of events",
        "[start, end] of events", data="SzCORE: TUSZ, CHB-MIT, Siena, or any", paper="2402.13005",
        aliases=("seizure_events", "szcore")),
)  # fmt: skip

_JUDGED = (
    TaskScorer("llava_bench", llava_bench, "relative_score", ("judgement", "judge"),
        ("category", "caption", "question", "image", "cluster"), ("official", "substitute"), "the reference answer",
        data="huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild", paper="2304.08485",
        aliases=("llava_w", "llavabench", "llava_in_the_wild"),
        judge=Judge(llava_prompt, {"rule": "llava/eval/table/rule.json of github.com/haotian-liu/LLaVA"})),
    TaskScorer("mm_vet", mm_vet, "score", ("judgement", "judge"), ("capability", "question", "image", "cluster"),
        ("official", "substitute"), "the answer, with <AND> and <OR>", data="github.com/yuweihao/MM-Vet",
        licence="Apache-2.0", paper="2308.02490", aliases=("mmvet",),
        judge=Judge(mm_vet_prompt,
            {"prompt": "the text of `prompt` in mm-vet_evaluator.py of github.com/yuweihao/MM-Vet"})),
)  # fmt: skip

#: All entries.
ENTRIES = (*_ANY, *_SHORT_ANSWERS, *_MULTIPLE_CHOICE, *_YES_NO, *_CAPTIONS, *_SIGNALS, *_JUDGED)

#: What people ask for that is not there, with the reason.
REFUSED = {
    "meteor": "it needs Java and a jar of paraphrases; `coco_captions` gives CIDEr-D, BLEU and ROUGE-L",
    "spice": "it needs Java and Stanford CoreNLP; `coco_captions` gives CIDEr-D, BLEU and ROUGE-L",
    "spider": "half of it is SPICE, which needs Java and Stanford CoreNLP; `audio_captions` gives CIDEr-D",
}
