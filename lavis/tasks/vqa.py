"""VQA accuracy (Antol et al. 2015; Goyal et al. 2017), as https://visualqa.org/evaluation.html."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
# What the published table makes of words that lack one of these apostrophes.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the published pattern: `(?!<=` is no look-behind


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """How far an answer agrees with people's, 0 to 1, both as :func:`normalize_vqa` gives them.

    For each person, the others who said it, over three and at most 1; the mean over all persons.
    """
    agreeing, people = sum(person == answer for person in given), len(given)
    full = min(1.0, agreeing / 3)
    without_one = min(1.0, max(agreeing - 1, 0) / 3)
    return (agreeing * without_one + (people - agreeing) * full) / people


def normalize_vqa(text: str) -> str:
    """Punctuation, case, number words, articles and contractions as the published script does."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for sign in _PUNCTUATION:
        at_edge = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if at_edge or in_number else " ")
    plain = _PERIOD.sub("", plain, count=32)  # the script gives a flag, 32, as the count
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_textvqa(text: str) -> str:
    """As TextVQA's evaluation (MMF's ``EvalAIAnswerProcessor``): commas, question marks and
    possessives first, then as :func:`normalize_vqa`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(text)
