"""A few questions that any assistant should still answer after it was tuned: did it forget what it knew?"""

import re
from typing import NamedTuple


class Question(NamedTuple):
    """What is asked, and what a right answer contains."""

    text: str
    right: str

    def answered_by(self, text: str) -> bool:
        """Whether an answer holds what is looked for; case does not matter."""
        return re.search(self.right, text, re.IGNORECASE) is not None


QUESTIONS = (
    Question("What is the capital of France?", r"\bparis\b"),
    Question("What is the capital of Japan?", r"\btokyo\b"),
    Question("What is the capital of Italy?", r"\brome\b|\broma\b"),
    Question("In which country is the city of Cairo?", r"\begypt\b"),
    Question("On which continent is Brazil?", r"\bsouth america\b"),
    Question("Which planet do we live on?", r"\bearth\b"),
    Question("Which star does the Earth go around?", r"\bsun\b"),
    Question("What is 2 + 3? Answer with the number.", r"\b5\b|\bfive\b"),
    Question("What is 10 minus 4? Answer with the number.", r"\b6\b|\bsix\b"),
    Question("What is 3 times 3? Answer with the number.", r"\b9\b|\bnine\b"),
    Question("How many days has a week?", r"\b7\b|\bseven\b"),
    Question("How many months has a year?", r"\b12\b|\btwelve\b"),
    Question("How many minutes has an hour?", r"\b60\b|\bsixty\b"),
    Question("How many legs has a spider?", r"\b8\b|\beight\b"),
    Question("What is frozen water called?", r"\bice\b"),
    Question("What colour do you get when you mix blue and yellow?", r"\bgreen\b"),
    Question("What is the opposite of hot?", r"\bcold\b|\bcool\b"),
    Question("What is the plural of mouse, the animal?", r"\bmice\b"),
    Question("Which day comes after Monday?", r"\btuesday\b"),
    Question("Which animal barks?", r"\bdogs?\b"),
    Question("Who wrote the play Romeo and Juliet?", r"\bshakespeare\b"),
    Question("What gas do people need to breathe?", r"\boxygen\b"),
    Question("Translate the Spanish word hola into English.", r"\bhello\b|\bhi\b"),
    Question("Write the word cat backwards.", r"\btac\b"),
)
