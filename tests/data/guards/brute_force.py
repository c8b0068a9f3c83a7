"""The guards said again in plain Python, character by character and string by string, as an oracle."""

import math
import unicodedata
from collections import Counter, defaultdict

NO_SPACES = ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HIRAGANA", "KATAKANA", "BOPOMOFO")
HAN = 3


def units(text):
    """Return (unit, weight factor) pairs: 0 for a word or symbol, 2 for a letter, 3 for an ideograph."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).replace("ı", "i")
    found, last = [], None
    for character in text:
        category, name = unicodedata.category(character), unicodedata.name(character, "")
        if category == "Cf" or character == "\u0307" or "\ufe00" <= character <= "\ufe0f":
            continue
        if category[0] == "M":
            if last is not None and last != "symbol":
                found[-1][0] += character
            else:
                last = None
            continue
        digit = unicodedata.decimal(character, None)
        if digit is not None:
            character, kind = str(digit), "word"
        elif category[0] in "LN":
            kind = 2 if name.startswith(NO_SPACES) else "word"
            if name.startswith("CJK") or character in "々〇〆":
                kind = HAN
        elif category in ("Sm", "Sc", "So"):
            kind = "symbol"
        else:
            last = None
            continue
        if kind == "word" and last == "word":
            found[-1][0] += character
        else:
            found.append([character, kind if isinstance(kind, int) else 0])
        last = kind
    return [(unit, factor) for unit, factor in found]


def stretches(pairs, words, characters, allowed=None):
    """Return (start, stop, words joined) of every stretch, the shortest from each unit that weighs enough."""
    found = []
    for start in range(len(pairs)):
        weight = 0.0
        for stop in range(start, len(pairs)):
            if allowed is not None and not allowed[stop]:
                break
            factor = pairs[stop][1]
            weight += factor / 2 / characters if factor else 1 / words
            if weight > 1 - 1e-9:
                found.append((start, stop + 1, "|".join(unit for unit, _ in pairs[start : stop + 1])))
                break
    return found


def shingles(text):
    pairs = units(text)
    if not pairs:
        return []
    edge = [("<>", 0)] * 2
    return stretches(edge + pairs + edge, 3, 6)


def frequent(texts, share, fewest):
    counts = Counter(shingle for text in texts for shingle in {wording for _, _, wording in shingles(text)})
    return {shingle for shingle, count in counts.items() if count >= max(fewest, math.ceil(share * len(texts)))}


def exact_key(text):
    pairs = units(text)
    return tuple(unit for unit, _ in pairs) if pairs else " ".join(text.split())


def duplicates(examples):
    seen, flags = set(), []
    for inputs, targets in examples:
        key = exact_key(inputs), exact_key(targets)
        flags.append(key in seen)
        seen.add(key)
    return flags


def jaccard(one, other):
    return len(one & other) / len(one | other) if one | other else 1.0


def longest_change(text, others):
    """Return the largest weight of units in a row that no shared shingle covers, in words."""
    pairs = units(text)
    covered = [False] * len(pairs)
    for start, stop, wording in shingles(text):
        if wording in others:
            for place in range(max(start - 2, 0), min(stop - 2, len(pairs))):
                covered[place] = True
    longest = weight = 0.0
    for (_, factor), is_covered in zip(pairs, covered, strict=True):
        weight = 0.0 if is_covered else weight + (factor / 2 / 2 if factor else 1)
        longest = max(longest, weight)
    return longest


def near_duplicates(examples, groups, *, threshold=0.8, share=0.2):
    """Flag every example that is nearly an earlier one of its group, by comparing all pairs."""
    flags, exact = [], duplicates(examples)
    of_group = defaultdict(list)
    for example, group in zip(examples, groups, strict=True):
        of_group[group].append(example[0])
    wording = {
        group: frequent(texts, share, 5 if len(texts) >= 20 else 3) if len(texts) >= 5 else set()
        for group, texts in of_group.items()
    }
    every = [[{wording for _, _, wording in shingles(text)} for text in example] for example in examples]
    for later, (example, group) in enumerate(zip(examples, groups, strict=True)):
        flag = False
        for earlier in range(later):
            if groups[earlier] != group or exact[earlier] or exact[later]:
                continue
            mine, theirs = every[later], every[earlier]
            flag |= (
                jaccard(mine[0] - wording[group], theirs[0] - wording[group]) >= threshold
                and jaccard(mine[1], theirs[1]) >= threshold
                and all(
                    longest_change(example[half], theirs[half]) <= 5
                    and longest_change(examples[earlier][half], mine[half]) <= 5
                    for half in (0, 1)
                )
            )
        flags.append(flag)
    return flags


def contamination(examples, evaluation, *, train_groups, share=0.2):
    """Return for each example (exact, ngram): whether it holds an evaluation text."""
    of_train = defaultdict(list)
    for (inputs, _), group in zip(examples, train_groups, strict=True):
        of_train[group].append(inputs)
    train_wording = set().union(*(frequent(texts, share, 5) for texts in of_train.values() if len(texts) >= 20))
    of_group = defaultdict(list)
    for text in evaluation:
        for half, content in enumerate((text.inputs, text.targets)):
            of_group[text.task, text.language, text.template, half].append(content)
    wording = {}
    for group, texts in of_group.items():
        found = frequent(texts, share, 3)
        wording[group] = found if len(texts) >= 50 else found & train_wording
    exact, ngrams, whole = set(), set(), set()
    for text in evaluation:
        exact |= {exact_key(text.inputs), exact_key(text.inputs + " " + text.targets)}
        has_entry = False
        for half, content in enumerate((text.inputs, text.targets)):
            pairs = units(content)
            allowed = [True] * len(pairs)
            for start, stop, shingle in shingles(content):
                if shingle in wording[text.task, text.language, text.template, half]:
                    for place in range(max(start - 2, 0), min(stop - 2, len(pairs))):
                        allowed[place] = False
            full = stretches(pairs, 13, 30, allowed)
            ngrams |= {wording for _, _, wording in full}
            has_entry |= bool(full)
            begins = [p for p in range(len(pairs)) if allowed[p] and (p == 0 or not allowed[p - 1])]
            for begin in begins if half == 0 else []:
                stop = begin
                while stop < len(pairs) and allowed[stop]:
                    stop += 1
                piece = pairs[begin:stop]
                if not stretches(piece, 13, 30) and stretches(piece, 8, 18)[:1] and stretches(piece, 8, 18)[0][0] == 0:
                    whole.add("|".join(unit for unit, _ in piece))
                    has_entry = True
        if not has_entry and stretches(units(text.inputs), 8, 18):
            whole.add("|".join(unit for unit, _ in units(text.inputs)))
    flags = []
    for inputs, targets in examples:
        joined = units(inputs) + units(targets)
        line = "|" + "|".join(unit for unit, _ in joined) + "|"
        flags.append(
            (
                exact_key(inputs) in exact or exact_key(inputs + " " + targets) in exact,
                any(wording in ngrams for _, _, wording in stretches(joined, 13, 30))
                or any(f"|{wording}|" in line for wording in whole),
            )
        )
    return flags
