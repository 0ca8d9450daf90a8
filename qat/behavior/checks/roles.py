"""Check that the model speaks as the persona, and for nobody else."""

from __future__ import annotations

from functools import lru_cache

import regex

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed


class RoleConfusion(Params):
    """Names of the user, as whom the model must not speak."""

    user: tuple[str, ...] = ()


_OTHERS = (
    r"chat\s?gpt|gpt-?[345o]\w*|claude|qwen\d*|tongyi|gemini|bard|llama(?:\s?\d)?|mistral|nemotron|deepseek|kimi|copilot|siri|alexa|grok|"
    r"google\s+assistant|phi-?\d"
)
_MAKERS = (
    r"openai|anthropic|alibaba(?:\s+cloud)?|google(?:\s+deepmind)?|meta(?:\s+ai)?|nvidia|mistral\s+ai|deepseek|microsoft|"
    r"moonshot(?:\s+ai)?|xai"
)
_I_AM = r"(?:i\s+am|i['’]m)"
_MACHINE = (
    r"(?:large\s+|artificial\s+)?(?:language\s+model|machine\s+learning\s+model|artificial\s+intelligence|intelligence|"
    r"virtual\s+assistant|computer\s+program|chat\s?bot|bot|program|machine)"
)
# "Your AI companion" is what a persona may call itself; "an AI assistant" is what models say of themselves.
_AI = r"ai(?!\s+(?:companion|friend))"
_ENGLISH = regex.compile(
    rf"""\b(?:{_I_AM}|my\s+name\s+is|this\s+is|call\s+me)\s+(?:actually\s+|really\s+|just\s+)?(?:{_OTHERS})\b
      | \b(?:as|being|(?:{_I_AM})(?:\s+(?:just|only|simply|merely|actually))?)\s+an?\s+(?:{_MACHINE}
        |{_AI})\b(?!\s+(?:engineer|student|teacher|company|fan))
      | \b(?:{_I_AM}|as|call\s+me|refer\s+to\s+me\s+as|name\s+is)\s[^.!?\n]{{0,40}}\b(?:an?
        |your)\s+{_AI}\s+(?:\w+\s+)?
        (?:assistant|model|system|program|chat\s?bot|helper)\b
      | \b(?:i\s+was|{_I_AM}|model|assistant)\s+(?:\w+\s+)?(?:developed|created|made|trained
        |built)\s+by\s+(?:{_MAKERS})\b
      | \bmy\s+(?:developers?|creators?|makers?|training\s+data|knowledge\s+cut-?off)\b""",
    regex.VERBOSE | regex.IGNORECASE,
)
_OTHER_LANGUAGES = regex.compile(
    r"""\b(?:ich\s+bin|als)\s+(?:ein[e]?\s+)?(?:reine?s?\s+)?(?:ki\b|ki-|künstliche\s+intelligenz
      |(?:ki-)?sprachmodell|(?:großes\s+)?sprachmodell|virtueller?\s+assistent)
      | \b(?:je\s+suis|en\s+tant\s+qu['’e])\s*(?:une?\s+)?(?:ia\b|intelligence\s+artificielle
        |(?:grand\s+)?modèle\s+de\s+langage|assistant\s+virtuel)
      | \b(?:soy|como)\s+(?:una?\s+)?(?:asistente\s+(?:de\s+|virtual)|modelo\s+de\s+len?guaje
        |inteligencia\s+artificial|ia\b)
      | \b(?:sou|como)\s+(?:uma?\s+)?(?:assistente\s+virtual|modelo\s+de\s+linguagem|inteligência\s+artificial|ia\b)
      | \b(?:sono|come|in\s+quanto)\s+(?:un['’a]?\s*)?(?:assistente\s+virtuale|modello\s+linguistico
        |intelligenza\s+artificiale|ia\b)
      | \bя\s*[—–-]?\s*(?:всего\s+лишь\s+|просто\s+|большая\s+)?(?:языковая\s+модель|ии\b|нейросеть
        |искусственный\s+интеллект|чат-?бот)
      | \bкак\s+(?:языковая\s+модель|ии\b|искусственный\s+интеллект)
      | (?:ನಾನು|ನನ್ನನ್ನು)\s(?:\S+\s){0,4}(?:ಎಐ|AI|ಭಾಷಾ\sಮಾದರಿ|ಕೃತಕ\sಬುದ್ಧಿ\S*|ಚಾಟ್\u200C?ಬಾಟ್|ಚಾಟ್\u200C?ಜಿಪಿಟಿ|ಕ್ಲಾಡ್|ಜೆಮಿನಿ)
      | (?:ಎಐ|AI|ಭಾಷಾ)\s(?:ಭಾಷಾ\s)?ಮಾದರಿಯಾಗಿ
      | (?:मैं|मुझे|एक)\s(?:\S+\s){0,3}(?:एआई|AI|ए\.?आई\.?|भाषा\sमॉडल|कृत्रिम\sबुद्धि\S*|चैटबॉट|चैट\s?जीपीटी|क्लॉड|जेमिनी)
      | நான்\s(?:\S+\s){0,4}(?:AI|மொழி\sமாதிரி|செயற்கை\sநுண்ணறிவு|சாட்ஜிபிடி) | నేను\s(?:\S+\s){0,4}(?:AI|ఏఐ|భాషా\sనమూనా
        |కృత్రిమ\sమేధ)
      | (?:我是|我叫|我作为|作为|我只是|一[个名款])[^。！？\n]{0,30}?(?:人工智能|AI|大?语言模型|聊天机器人
        |虚拟助[手理])(?!公司|行业)
      | 我是\s?(?:通义千问|文心一言|豆包|智谱|讯飞星火|ChatGPT|Claude|DeepSeek|Kimi|Qwen)
      | (?:私|わたし|僕)は[^。\n]{0,20}(?:AI|人工知能|言語モデル|ChatGPT) | AI(?:言語モデル|アシスタント)として
      | 저는[^.\n]{0,20}(?:AI|인공지능|언어\s?모델) | أنا\s(?:\S+\s){0,3}(?:نموذج\sلغوي|ذكاء\sاصطناعي
        |مساعد\sافتراضي)""",
    regex.VERBOSE | regex.IGNORECASE,
)
_TURNS = regex.compile(
    r"""<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|eom_id|endoftext|begin_of_text)\|>
      | <\|(?:user|assistant|system|end|start|message|return|turn|START_OF_TURN_TOKEN|END_OF_TURN_TOKEN
        |start_of_role|end_of_role)\|>
      | <｜(?:User|Assistant|end▁of▁sentence|begin▁of▁sentence)｜>
      | <(?:start|end)_of_turn>|<turn\|>|<\|turn>|<extra_id_\d>|<SPECIAL_\d+>|</?s>|\[/?INST\]|<</?SYS>>
        |\[/?SYSTEM_PROMPT\]
      | ^[ \t]*(?:\#+[ \t]*|\*\*)?(?:user|human|assistant|system|bot|ai|language\s+model)(?:\*\*)?\s*[:：]""",
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)


@lru_cache(maxsize=256)
def _as_user(names: tuple[str, ...]) -> regex.Pattern[str]:
    any_name = "|".join(map(regex.escape, names))
    return regex.compile(
        rf"\b(?:i\s+am|i['’]m|my\s+name\s+is)\s+(?:{any_name})\b|(?:ನಾನು|ನನ್ನ\sಹೆಸರು|मैं|मेरा\sनाम)\s(?:{any_name})(?!\p{{L}}|\p{{M}})",
        regex.IGNORECASE,
    )


@check("no_role_confusion", RoleConfusion)
def no_role_confusion(reply: Reply, params: RoleConfusion) -> CheckResult:
    """The model speaks as the persona: not as another assistant or "an AI", not for the user, and without turn markers.

    "I'm Annie, not ChatGPT" and "your AI companion" are the persona's own words and pass.
    """
    for text in reply.texts:
        found = _TURNS.search(text) or _ENGLISH.search(text) or _OTHER_LANGUAGES.search(text)
        if found is None and params.user:
            found = _as_user(params.user).search(text)
        if found:
            return failed(f"speaks as another: {found.group().strip()!r}")
    return PASSED
