"""Questions that `bitdistiller init` writes down, so that a chain can start: every kind of task with every subject."""

from __future__ import annotations

_SUBJECTS: dict[str, tuple[str, ...]] = {
    "thing": (
        "the printing press", "photosynthesis", "the Roman Empire", "inflation", "the human heart", "tides",
        "jazz", "vaccination", "the Silk Road", "plate tectonics", "the internet", "democracy", "coffee",
        "the theory of evolution", "solar panels", "the French Revolution", "black holes", "chess", "honey bees",
        "impressionism", "the water cycle", "bridges", "sleep", "the stock market",
    ),
    "skill": (
        "learn a new language", "bake bread", "prepare for a job interview", "grow tomatoes on a balcony",
        "save money every month", "give a short speech", "repair a flat bicycle tyre", "plan a weekend abroad",
        "write a letter of complaint", "start running", "organise a small party", "choose a laptop",
    ),
    "code": (
        "reverses a string", "counts the words in a text", "finds the largest number in a list",
        "checks whether a word is a palindrome", "merges two sorted lists", "reads a CSV file",
        "removes duplicates from a list and keeps the order", "computes the n-th Fibonacci number",
        "turns a date into a weekday", "finds all prime numbers below n", "groups words by their first letter",
        "sorts dictionaries by a key",
    ),
    "numbers": (
        "3 apples cost 2.40 euros. What do 7 apples cost?", "A train goes 150 km in 2 hours. How far in 5 hours?",
        "A shirt of 40 euros is sold for 30 euros. By how many per cent was the price cut?",
        "Anna is 4 years older than Ben; together they are 30. How old is Ben?",
        "A tank of 240 litres fills at 8 litres a minute. How long does it take?",
        "How many handshakes are there if 6 people shake hands once each?",
        "A rectangle is 12 cm long and 5 cm wide. What are its area and its perimeter?",
        "Half of a number is 9 more than a third of it. What is the number?",
    ),
}  # fmt: skip
_TASKS: dict[str, tuple[str, ...]] = {
    "thing": (
        "Explain {} to a twelve-year-old.",
        "What is important to know about {}? Answer in five points.",
        "Write a short encyclopedia article about {}.",
        "Which mistakes do people often make about {}?",
        "Write a short story in which {} plays a part.",
        "How has our view of {} changed over time?",
    ),
    "skill": (
        "How do I {}? Give the steps in order.",
        "A friend wants to {}. Write a friendly message with advice.",
        "What do I need to {}, and what can go wrong?",
    ),
    "code": (
        "Write a Python function that {}. Explain it in one sentence.",
        "Write a Python function that {}, with a docstring and two examples.",
    ),
    "numbers": ("{} Think step by step.",),
}


def starter_prompts() -> list[str]:
    """All of them, each once; any run of them holds all kinds, as far as there are that many."""
    kinds = [_mixed(tasks, _SUBJECTS[kind]) for kind, tasks in _TASKS.items()]
    places = [((at + 0.5) / len(kind), text) for kind in kinds for at, text in enumerate(kind)]
    return [text for _, text in sorted(places)]


def _mixed(tasks: tuple[str, ...], subjects: tuple[str, ...]) -> list[str]:
    """Every task with every subject, so that neighbours differ in both."""
    return [
        tasks[(at + shift) % len(tasks)].format(subject)
        for shift in range(len(tasks))
        for at, subject in enumerate(subjects)
    ]
