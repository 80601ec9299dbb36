"""Subjects and sentences of the conversations in the topic prompts."""

from __future__ import annotations

SUBJECTS = [
    "beekeeping",
    "bridge building",
    "bread baking",
    "bird migration",
    "bicycle design",
    "book printing",
    "cave exploration",
    "cheese making",
    "chess openings",
    "city gardens",
    "clock making",
    "coral reefs",
    "desert travel",
    "early cinema",
    "folk music",
    "forest fires",
    "glass blowing",
    "honey trading",
    "ice skating",
    "jazz piano",
    "kite flying",
    "lighthouses",
    "map drawing",
    "medieval castles",
    "mountain rescue",
    "ocean currents",
    "opera singing",
    "paper folding",
    "pottery",
    "public libraries",
    "railway stations",
    "river ferries",
    "rock climbing",
    "sailing ships",
    "salt mining",
    "silk weaving",
    "stage lighting",
    "stone carving",
    "street markets",
    "tea ceremonies",
    "tidal power",
    "volcanoes",
    "water mills",
    "whale song",
    "wine growing",
]
ASPECTS = [
    "the history of",
    "the economics of",
    "the future of",
    "the science behind",
    "the art of",
    "the dangers of",
    "the language of",
    "the law of",
    "the best books about",
    "the tools of",
    "the first steps in",
    "the ethics of",
    "common mistakes in",
    "famous people in",
    "the role of women in",
    "the teaching of",
    "the politics of",
    "the mathematics of",
    "the sounds of",
    "the geography of",
]
EXCHANGES = (
    (
        "I have been curious about it for a while. Where should somebody start who knows nothing yet?",
        "A good start is to look at how people came to it in the first place. They had a problem of every day to "
        "solve, and what they found out was handed on by word of mouth long before anybody wrote it down.",
    ),
    (
        "That makes sense. What do most people get wrong about it?",
        "Most people think that it is a matter of talent. Those who have done it for years say that it is patience, "
        "and a notebook in which one writes down what did not work.",
    ),
    (
        "How has it changed over the last hundred years?",
        "The materials are cheaper and the results are more alike. Some say that much has been lost with that, others "
        "that far more people can take part in it now.",
    ),
    (
        "Is there a place where one can see it done well?",
        "Small museums are often the best place, since somebody there has time for questions. Ask for a visit in the "
        "morning, when it is quiet.",
    ),
    (
        "Thank you, that was helpful.",
        "You are welcome. Tell me when you would like to talk about something else.",
    ),
)
