"""The prompts of the demo: every template with every subject of its kind, in a fixed mixed order."""

from __future__ import annotations

ARTICLES = (
    "Write an encyclopedia article about {}.",
    "Give a detailed history of {}, with names, places and years.",
    "Explain {} to a curious student, in several paragraphs.",
)
MANUALS = (
    "Write the reference manual section on {} in the Python language.",
    "Explain {} in Python, with the exact rules and the special cases.",
)
SUBJECTS = (
    "the Roman aqueducts", "the steam engine", "the Battle of Waterloo", "the planet Jupiter", "photosynthesis",
    "the city of Venice", "the Amazon river", "the printing press", "Antarctic exploration", "the violin",
    "the French Revolution", "earthquakes", "the honey bee", "the Silk Road", "Gothic cathedrals",
    "the Beatles", "the Olympic Games", "vaccination", "the Great Wall of China", "coral reefs",
    "the theory of evolution", "a river ferry service", "the Mughal Empire", "a television drama series",
    "the Apollo program", "the game of chess", "volcanoes of Iceland", "the Ottoman navy", "a baseball season",
    "the trade in spices", "the suspension bridge", "impressionist painting", "tropical cyclones", "the grey wolf",
    "a role-playing video game", "a heavy metal album", "Queen Victoria", "the kakapo parrot", "naval battleships",
    "the Meiji period in Japan", "the moons of Saturn", "a highway in Michigan", "the poetry of John Keats",
    "the Polish cavalry", "a lighthouse on a rocky coast", "the discovery of oxygen", "a university football team",
    "the deserts of Australia",
)  # fmt: skip
TOPICS = (
    "integer division", "the for statement", "exceptions", "class definitions", "attribute access", "slicing",
    "the import statement", "operator precedence", "string formatting", "dictionaries", "generators", "lambda",
    "the with statement", "comparison operators", "mutable sequences", "function calls", "decorators", "assignment",
    "name resolution", "special method names", "numeric literals", "coroutines", "the pass statement", "sets",
)  # fmt: skip


def demo_prompts() -> list[str]:
    """All prompts; any run of them holds articles and manual sections alike."""
    articles = [template.format(subject) for template in ARTICLES for subject in SUBJECTS]
    manuals = [template.format(topic) for template in MANUALS for topic in TOPICS]
    mixed: list[str] = []
    for index, article in enumerate(articles):
        mixed.append(article)
        if index % 3 == 2:
            mixed.append(manuals[index // 3])
    return mixed
