"""Whether a reply throws the ball back: a question to the user, or an invitation without a question mark."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.behavior.checks.speech import broken_up, sentences
from qat.data.text import find_follow_up

_QUOTED = regex.compile(
    r"\"[^\"\n]*\"|“[^”\n]*”|„[^“”\n]*[“”]|«[^»\n]*»|「[^」\n]*」|(?<!\w)'[^'\n]*'(?!\w)|‘[^’\n]*’(?!\w)"
)
_QUESTION = regex.compile(r"[?？؟⁈⁇፧][\"'”’)\]»]*$")
_ADDRESSES = regex.compile(
    r"""\b(?:you|your|yours|u|shall|should)\b
      | ^(?:(?:is|are|does|do)\s+(?:that|this|it|they|these|all)\b.{0,120}\b)?(?:ok|okay|alright|ready|right)\W*$
      | ನೀವು|ನಿಮ|ಬೇಕಾ|ಬೇಕೇ|आप|तुम|चाह|\b(?:du|dir|dich|ihnen|sie|vous|tu|usted|você|tú|vuoi|voglia)\b|您|你|あなた
        |உங்கள்|மీరు|వాలా""",
    regex.IGNORECASE | regex.VERBOSE,
)
_INVITES = regex.compile(
    r"""\b(?:please\s+)?(?:do\s+)?let\s+me\s+know\b | \bjust\s+(?:ask|say\s+the\s+word)\b | \bfeel\s+free\b
      | \b(?:happy|glad)\s+to\s+(?:help|assist)\b.{0,20}\b(?:anything|more|further|else|again|when|whenever
        |any\s?time)\b
      | \b(?:anything|something)\s+else\s+(?:you|i|on\s+your)\b | ^\W*(?:anything|what)\s+else\W*$
      | \btell\s+me\s+(?:more|about|what|which|when|where|how|if|the|your)\b | \bask\s+me\b.{0,120}\bany\s?time\b
      | \b(?:don['’]t|do\s+not)\s+hesitate\b | \breach\s+out\s+(?:to\s+me|any\s?time|if|when)\b
      | \b(?:ping|message|call|text)\s+me\s+(?:when|if|any\s?time)
      | ^\W*say\s+(?:when|the\s+word|yes|so)\b.{0,120}\b(?:and|if|i)\b
      | \bplease\s+(?:be\s+(?:more\s+)?specific|(?:provide|share|tell|give|send|specify|clarify|confirm|choose)\s*
        (?:me|us|with|the|your|a|an|any|more|which|what|one)\b)
      | \bif\s+you(?:['’]d|\s+would)?\s+(?:like|want|wish|need)\b.{0,120}\b(?:i\s+can|i\s+could|tell\s+me|say)\b
      | \b(?:i\s+can|i\s+could)\s.{0,120}\bif\s+you(?:['’]d|\s+would)?\s+(?:like|want|wish|need)\b
      | \bI(?:['’]m|\s+am)\s+(?:\w+\s+){0,2}here\s+(?:for\s+you|(?:if|when|whenever)\s+you)\b
      | \bwhat\s+(?:do\s+you\s+think|about\s+you)\W*$ | \bhow\s+about\s+you\W*$""",
    regex.VERBOSE | regex.IGNORECASE,
)
_INVITES_ROMAN = regex.compile(
    r"""\b(?:lass|lassen\s+sie)\s+(?:es\s+)?mich\s+wissen\b | \bsag(?:en\s+sie)?\s+(?:mir\s+)?bescheid\b
      | \bfrag(?:en\s+sie)?\s+(?:mich\s+)?(?:einfach|gern|ruhig|jederzeit)\b | \bmeld(?:e|en)\s+(?:dich|sie\s+sich)\b
      | \bn['’]hésite[zs]?\b | \b(?:dis|dites)[- ]moi\b | \b(?:fais|faites)[- ](?:le[- ])?moi\s+savoir\b
      | \b(?:avísame|avíseme|házmelo\s+saber|hágamelo\s+saber|cuéntame|dime|dígame)\b | \bno\s+dudes?\s+en\b
      | \bpor\s+favor,?\s+(?:proporciona|dime|indica|comparte|especifica|proporcione|indique|diga)\w*
      | \b(?:me\s+avis[ea]|me\s+diga|é\s+só\s+(?:pedir|dizer|chamar)|fammi\s+sapere|non\s+esitare
        |mi\s+faccia\s+sapere)\b""",
    regex.VERBOSE | regex.IGNORECASE,
)
"""German, French, Spanish, Portuguese, Italian."""
_INVITES_BEYOND = regex.compile(
    r"""(?:ನನಗೆ|ದಯವಿಟ್ಟು)\s+(?:ತಿಳಿಸಿ|ಹೇಳಿ)(?!\p{L}|\p{M}) | (?:ಬೇಕಾದರೆ|ಬೇಕಿದ್ದರೆ)\s.{0,120}(?:ತಿಳಿಸಿ|ಹೇಳಿ|ಕೇಳಿ)(?!\p{L}|\p{M})
      | (?:मुझे|कृपया)\s+(?:\S+\s+){0,3}(?:बताएं|बताएँ|बताइए|बताओ|बताना|बता\s+दें|बता\s+दीजिए) | बेझिझक
      | (?:எனக்கு|தயவுசெய்து)\s+(?:சொல்லுங்கள்|தெரிவிக்கவும்)
      | 请(?:随时)?(?:告诉|提供|联系|问)|随时(?:告诉|问|联系|找)|尽管(?:问|说) | お気軽に|遠慮なく|(?:教えて
        |お知らせ)ください
      | \bдай(?:те)?\s+(?:мне\s+)?знать\b | \bобращай(?:тесь|ся)\b | \bскажи(?:те)?\s+мне\b | أخبرني|لا\s+تتردد""",
    regex.VERBOSE | regex.IGNORECASE,
)
"""Kannada, Hindi, Tamil, Chinese, Japanese, Russian, Arabic; looked for in texts beyond ASCII only."""
# Questions of a voice that lost their mark, and of languages that write them without one.
_UNMARKED = regex.compile(
    r"(?:ಬೇಕಾ|ಬೇಕೇ|ಹೇಳಲಾ|ಮಾಡಲಾ|ಮಾಡಲೇ|ಹೇಳಲೇ|ಇದೆಯಾ|ಸರಿನಾ)\W*$|^\W*(?:would|shall|do|can|could|may|want)\s+(?:you|i|we|me)\b"
    r"|(?:です|ます|ません|でしょう)か\W*$|(?:까요|나요)\W*$",
    regex.IGNORECASE,
)

# What looks like a question or an invitation and is none.
_ASKING = regex.compile(
    r"^\W*(?:(?:and|so|but|or|well|okay|ok)\W+)*(?:wh(?:o|om|ose|at|ich|en|ere|y)|how|is|are|was|were|do|does|did|can|could|will"
    r"|would|shall|should|may|have|has|am)\b(?!\s+a\b)",
    regex.IGNORECASE,
)
_TAG = regex.compile(r"[,–—-]\s*(?:ok|okay|get\s+it|got\s+it|you\s+know|you\s+see|yeah)\s*[?？]+\W*$", regex.IGNORECASE)
_TAG_BEFORE_MORE = regex.compile(r"[,–—-]\s*(?:right|huh|eh|no|correct)\s*[?？]+\W*$", regex.IGNORECASE)
_CONSENT = regex.compile(r"\b(?:I['’]ll|I\s+will|we['’]ll|we\s+will|let['’]s|I['’]m\s+going\s+to)\b", regex.IGNORECASE)
_EXCLAIMED = regex.compile(
    r"^\W*(?:(?:and|but|well|oh)\W+)?(?:who\s+(?:knew|knows|cares)|who(?:['’]d|\s+would)(?:\s+have|['’]ve)\s+\w+|what\s+a\b.*"
    r"|is\s?n['’]t\s+(?:it|that)\s+\w+|(?:you\s+know|guess)\s+what)\s*[?？]+\W*$",
    regex.IGNORECASE,
)
_TOLD_NEXT = regex.compile(
    r"^\W*(?:\w+\W+){0,2}(?:(?:do|did)\s+you\s+(?:know|remember|recall)\b|(?:can|could)\s+you\s+guess\b|guess\s+wh"
    r"|remember\s+the\b|you\s+(?:ask|asked|mean|meant)\b|ever\s+wonder)",
    regex.IGNORECASE,
)
_OFFERS = regex.compile(
    r"^\W*(?:I\s+(?:can|could|will|would|need)|I['’](?:ll|d)|let\s+me|if\b|tell\b|say\b|please\b|then\s+I\b)",
    regex.IGNORECASE,
)
_REPORTED = regex.compile(
    r"^[^:?]{1,80}\b(?:says?|said|asks?|asked|reads|goes|writes|wrote)\s*:"
    r"|,\s*(?:(?:the|my|your|her|his)\s+\w+|she|he|they|\p{Lu}\w+)\s+(?:said|says|asked|asks|wrote|told\s+\w+)\b"
)
_QUESTION_FOLLOWS = regex.compile(
    r"^(?!.*\b(?:I\s+(?:have|need|just)|my|quick|one\s+more)\b).*\b(?:question|riddle|puzzle)s?\b[^:?]*:\W*$",
    regex.IGNORECASE,
)


@check("no_follow_up_question", Params)
def no_follow_up_question(reply: Reply, params: Params) -> CheckResult:
    """The reply does not throw the ball back.

    It fails where the last sentence is a question, where any sentence asks the user ("Should I …?", "… your …?"), and
    where it invites more without a question mark ("Let me know if …", also in other languages). A question inside
    quotation marks is the text of somebody else, and a question that the reply itself answers ("The capital?
    Bengaluru.") asks nobody.
    """
    for text in reply.texts:
        # A reply that stands as a whole in quotation marks quotes nobody.
        spoken = _QUOTED.sub("so", text) if not _QUOTED.fullmatch(text.strip()) else text.strip()[1:-1]
        own = _own_words(sentences(spoken))
        if offer := find_follow_up(broken_up("\n".join(own))):
            return failed(f"asks back: {offer}")
        for sentence in own:
            if _asks(sentence):
                return failed(f"asks back: {sentence}")
    return PASSED


def _own_words(spoken: Sequence[str]) -> list[str]:
    """The sentences without those that only look as if they asked the user.

    These are statements with a tag ("…, okay?"; with "right?" where more follows), exclamations, questions that the
    next sentence answers ("Do you know why? …"), what others say or ask, and the question of a quiz.
    """
    found = []
    for number, sentence in enumerate(spoken):
        following = spoken[number + 1] if number + 1 < len(spoken) else ""
        more = following and not _QUESTION.search(following) and not _OFFERS.search(following)
        tagged = _TAG.search(sentence) or (more and _TAG_BEFORE_MORE.search(sentence))
        harmless = (
            (tagged and not _ASKING.search(sentence) and not _CONSENT.search(sentence))
            or _EXCLAIMED.search(sentence)
            or (more and _TOLD_NEXT.search(sentence))
            or _REPORTED.search(sentence)
            or (number and _QUESTION_FOLLOWS.search(spoken[number - 1]))
        )
        if not harmless:
            found.append(sentence)
    return found


def _asks(sentence: str) -> bool:
    if _QUESTION.search(sentence) and _ADDRESSES.search(sentence):
        return True
    if any(pattern.search(sentence) for pattern in (_INVITES, _INVITES_ROMAN, _UNMARKED)):
        return True
    return not sentence.isascii() and _INVITES_BEYOND.search(sentence) is not None
