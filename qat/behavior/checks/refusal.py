"""Check that a reply does what it was asked instead of declining."""

from __future__ import annotations

import regex

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed
from qat.behavior.checks.speech import sentences

# Not to remember, find, know or hear is honesty about the facts and no refusal of the task.
_HONEST = (
    r"(?:even\s+|really\s+|quite\s+|yet\s+|seem\s+to\s+|help\s+but\s+)?(?:remember|recall|find|see|wait|hear|believe|imagine|"
    r"thank|complain|be\s+(?:sure|certain)|say\s+for|tell\s+for|say\s+no|agree|decide|sleep)"
)
_ENGLISH = regex.compile(
    rf"""\bI(?:['’]m|\s+am)?\s+(?:\w+ly\s+)?(?:cannot|can['’]?t|can\s+not|could\s+not\s+possibly
      |am\s+unable\s+to|unable\s+to|
            (?:am\s+)?not\s+(?:able|allowed|permitted|authori[sz]ed|designed|programmed|equipped)\s+to|won['’]t
              |will\s+not)
          \s+(?!{_HONEST}\b)
      | \bI\s+(?:must|have\s+to|will\s+have\s+to|need\s+to)\s+(?:respectfully\s+|politely\s+)?(?:decline
        |refuse)\b | \bI\s+(?:decline|refuse)\s+to\b
      | \bI(?:['’]d|\s+would)\s+rather\s+not\b | \bI(?:['’]m|\s+am)\s+not\s+comfortable\b
      | \bI\s+(?:do\s+not|don['’]t|currently\s+don['’]t|have\s+no|lack)\s+(?:currently\s+)?(?:have\s+)?(?:the\s+
        |any\s+|a\s+)?
        (?:ability|capability|capabilities|capacity|functionality|function|access|permission|means|feature
          |authori[sz]ation)\b
      | \b(?:is|are|lies|goes|that['’]s|it['’]s)\s+(?:\w+\s+)?(?:beyond|outside|not\s+within)\s+
        (?:of\s+)?(?:my|what\s+I)\s+(?:\w+\s+)?(?:abilit|capabilit|scope|knowledge|power|can\b)
      | \bnot\s+(?:something|a\s+thing|a\s+topic)\s+(?:that\s+)?I(?:['’]m|\s+am)?\s+(?:can|could|will|able)\b
      | \bsomething\s+(?:that\s+)?I(?:['’]m|\s+am)\s+not\s+able\b
      | \bmy\s+(?:current\s+)?(?:capabilit\w+|functions?)\s+(?:\w+\s+)?(?:is|are|allows?\s+me)\b
      | ^\W*I\s+can\s+only\s+(?!imagine|hope|guess)
      | \btools?\b[^.!?\n]{{0,160}}\b(?:do\s+not|don['’]t|isn['’]t|is\s+not|no)\b
        [^.!?\n]{{0,160}}\b(?:function|include|allow
        |support|able)""",
    regex.VERBOSE | regex.IGNORECASE,
)
_INABILITY = {
    "kn": r"(?:ಸಾಧ್ಯವಿಲ್ಲ|ಸಾಧ್ಯವಾಗುವುದಿಲ್ಲ|ಸಾಧ್ಯವಾಗಲ್ಲ|ಆಗುವುದಿಲ್ಲ|ಆಗಲ್ಲ|ಲಾರೆ|ಲಾಗುವುದಿಲ್ಲ)(?!\p{L}|\p{M})",
    "hi": r"नहीं\s(?:\S+\s)?(?:सकत[ीाे]|सकूँग[ीा]|सकूंग[ीा])|असमर्थ|मेरे\sबस\s|अनुमति\sनहीं",
    "ta": r"(?:முடியாது|இயலாது)",
    "te": r"(?:లేను|సాధ్యం\sకాదు|కుదరదు)",
    "ml": r"(?:കഴിയില്ല|സാധിക്കില്ല|പറ്റില്ല)",
    "bn": r"(?:পারব\sনা|পারি\sনা|সম্ভব\sনয়)",
    "de": r"\b(?:kann|darf|werde)\s+(?:ich\s+)?(?:\S+\s+){0,4}?(?:nicht|kein\w*)\b|\bnicht\s+in\s+der\s+Lage\b",
    "fr": r"\bje\s+ne\s+(?:peux|pourrai|suis)\s+(?:\S+\s+)?(?:pas|en\s+mesure)\b|\bje\s+refuse\b",
    "es": r"\bno\s+(?:puedo|podré|me\s+es\s+posible|soy\s+capaz|estoy\s+autorizad\w)\b",
    "pt": r"\bnão\s+(?:posso|consigo|sou\s+capaz)\b",
    "it": r"\bnon\s+(?:posso|sono\s+in\s+grado|riesco)\b",
    "zh": r"(?:我|抱歉|对不起|很遗憾)[^。！？\n]{0,12}(?:无法|不能|没办法|不可以|没有能力)(?!确定|忘记|想起|找到)",
    "ja": r"(?:できません|できかねます|いたしかねます|お答えできない)",
    "ko": r"(?:수\s없습니다|수\s없어요|못합니다|불가능합니다)",
    "ru": r"\bне\s+(?:могу|смогу|в\s+состоянии|имею\s+права)\b",
    "ar": r"لا\s(?:أستطيع|يمكنني|أقدر)|لست\sقادر",
}
_OTHER_LANGUAGES = regex.compile("|".join(f"(?:{pattern})" for pattern in _INABILITY.values()), regex.IGNORECASE)
_HONEST_ELSEWHERE = regex.compile(
    r"""ನೆನಪ|ಸಿಗ|ಹುಡುಕ|ಗೊತ್ತ | याद|मिल|ढूंढ|ढूँढ|पता | நினைவ|கிடைக் | గుర్తు|దొరక | ഓർമ | মনে
      | \b(?:erinner\w*|finde\w*|glaub\w*|warten|schlafen) | \b(?:souvi?en\w*|rappel\w*|trouve\w*|croire|attendre)
      | \b(?:recordar\w*|encontrar\w*|creer\w*|esperar) | \b(?:lembrar|encontrar|acreditar) | \b(?:ricordare|trovare)
      | 记得|想起|找到|等 | 思い出|見つ|覚え | 기억|찾을 | \b(?:вспомнить|найти|поверить|ждать) | تذكر|أجد""",
    regex.VERBOSE | regex.IGNORECASE,
)
_SELF = regex.compile(
    r"ನಾನು|ನನಗೆ|ನನ್ನ|ಕ್ಷಮಿಸಿ|मैं|मुझ|मेरे|क्षमा|माफ|என்னால்|நான்|மன்னி|నేను|నా|క్షమి|എനിക്ക്|ഞാൻ|ക്ഷമി|আমি|দুঃখিত|저는|제가|죄송|\bich\b|\bje\b|\bно\b|\bя\b|извин|\bmi\b",
    regex.IGNORECASE,
)
# Languages whose verb form names the speaker; the others need the pronoun or an apology in the sentence.
_SPEAKER_IN_VERB = regex.compile(
    "|".join(f"(?:{_INABILITY[code]})" for code in ("fr", "es", "pt", "it", "zh", "ja", "ar", "te", "ru")),
    regex.IGNORECASE,
)


@check("no_refusal", Params)
def no_refusal(reply: Reply, params: Params) -> CheckResult:
    """The reply does not decline: it claims no inability, no rule and no unwillingness to do what was asked.

    Honest limits of fact are no refusal: "I do not remember that", "I could not find it", "the service did not answer".
    Nor is what a third person cannot do.
    """
    for text in reply.texts:
        for sentence in sentences(text):
            if _ENGLISH.search(sentence) or _declines_elsewhere(sentence):
                return failed(f"declines: {sentence}")
    return PASSED


def _declines_elsewhere(sentence: str) -> bool:
    if not _OTHER_LANGUAGES.search(sentence) or _HONEST_ELSEWHERE.search(sentence):
        return False
    return _SPEAKER_IN_VERB.search(sentence) is not None or _SELF.search(sentence) is not None
