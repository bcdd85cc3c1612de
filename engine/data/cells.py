"""What stands in an answer column: a plain answer, or GSM8K's rationale that ends in `#### answer`."""

import re

_CALCULATOR_MARK = re.compile(r"<<.*?>>")


def read_plain(cell: object) -> tuple[str, None]:
    """(answer, None). Raises ValueError if the cell is empty."""
    answer = "" if cell is None else str(cell).strip()
    if not answer:
        raise ValueError("the answer is empty")
    return answer, None


def read_rationale(cell: object) -> tuple[str, str]:
    """(answer without commas, the rationale as a tagged trace). Raises ValueError if there is no `####`."""
    rationale, mark, answer = str(cell).rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError("the answer does not end in '#### number'")
    rationale = _CALCULATOR_MARK.sub("", rationale).strip()
    return answer, f"<think>\n{rationale}\n</think>\n<answer>{answer}</answer>"
