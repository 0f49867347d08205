"""Number words: how a problem may spell the numbers 0 to 99, and back."""

_UNITS, _TENS = (
    line.split()
    for line in (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
    )
)

LARGEST_WORD = 99


def spell(number: int) -> str:
    """The English words of a number from 0 to 99, hyphenated from twenty-one on."""
    if not 0 <= number <= LARGEST_WORD:
        raise ValueError(f"only 0 to {LARGEST_WORD} are spelled in words, not {number}")
    if number < len(_UNITS):
        return _UNITS[number]
    tens, units = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_UNITS[units]}" if units else "")


SPELLED: dict[str, int] = {spell(number): number for number in range(LARGEST_WORD + 1)}
