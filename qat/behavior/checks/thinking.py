"""Check that a reply holds no thinking, tagged or untagged."""

from __future__ import annotations

import regex

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed

_MARKS = regex.compile(
    r"""</?(?:[a-z]+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis
      |inner_monologue)\b[^>\n]{0,40}>
      | \[/?(?:THINK|THINKING|REASONING)\]
      | ◁/?think▷
      | <\|/?(?:think|thinking|begin_of_thought|end_of_thought|inner_prefix|START_THINKING|END_THINKING)\|?>
      | <\|channel\|?>\s*(?:analysis|thought)
      | ^[ \t]*(?:assistant)?(?:analysis|thought)[ \t]*(?:\n|:)
      | ^[ \t]*(?:assistant)?analysis(?=[A-Z]\w) | assistantfinal\b
      | \A\s*(?:reasoning|thinking|thought\s+process|chain\s+of\s+thought|plan)\s*:""",
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)
_WANTS = r"""(?:is|was|has|had|wants?|asks?|asked|said|says|just|seems?|might|mentioned|needs|didn|doesn|hasn|provided|
             gave|requests?|requested|specified|greeted|only|probably|already)"""
# Reasoning that lost its tags: it speaks of the user in the third person or of the reply as a task.
_OPENS = regex.compile(
    rf"""^\W*(?:(?:okay|ok|alright|hmm+|so|well|now|first|wait)[,.]?\s+){{0,2}}
        (?: (?:the\s+|this\s+)?user\s+{_WANTS}
          | (?:we|i)\s+(?:need|have|should|must)\s+(?:to\s+)?
            (?:respond|reply|answer|produce|figure|think|call\s+the\s+\w+\s+(?:tool|function)|
               check\s+(?:the|if|whether)\s+(?:user|rules|tools?|system))
          | let(?:'s|\s+me|\s+us)\s+(?:think\s+(?:about\s+(?:what|how|whether|this|the\s+user|which)|through
            |step)|reason|
               analy[sz]e\s+(?:the\s+(?:user|request|query)|what)|see\s+what\s+the\s+user|
               (?:tackle|parse|address)\s+(?:the\s+user|this\s+(?:request|query)))
          | let\s+me\s+break\s+this
          | (?:according\s+to|per|based\s+on|since|as|because)\s+(?:the|my)\s+
            (?:rules|instructions|system\s+prompt|guidelines)
        )\b""",
    regex.VERBOSE | regex.IGNORECASE,
)
_OF_THE_USER = regex.compile(
    r"""(?:^|[.!?,:;]\s+|\b(?:so|since|because|wait|that|as|but|okay|here|if)\s+)the\s+user\s+
         (?:wants|is\s+asking|asked|asks|said|says|seems|mentioned|requested|just|didn['’]t|did\s+not|hasn['’]t
           |might|needs\s+me)\b
      | \bthe\s+user['’]s\s+(?:request|question|query|message|intent)\b
      | ಬಳಕೆದಾರ(?:ರು|ನು|ಳು)?\s | उपयोगकर्ता\s | यूज़र\s | பயனர்\s | వినియోగదారు\s | ব্যবহারকারী\s | ഉപയോക്താവ്
      | (?:^|[。！，,：:])\s*用户(?:在|想|要|问(?!题)|希望|说|提到|让|需要|询问|请求) | ユーザー(?:は|が|の)
        | 사용자(?:가|는)
      | \bl['’]utilisat(?:eur|rice)\s+(?:demande|veut|souhaite|dit|a|me|cherche)\b
      | \b(?:el\s+usuario|la\s+usuaria)\s+(?:pregunta|quiere|pide|dice|solicita|ha|está)\b
      | \b(?:der|die)\s+(?:nutzer|benutzer)(?:in)?\s+(?:fragt|möchte|will|sagt|bittet|hat|braucht)\b
      | \bo\s+usuário\s+(?:pergunta|quer|pede|disse|está)\b | \bl['’]utente\s+(?:chiede|vuole|ha|dice)\b
      | \bпользовател[ья]\s+(?:спрашивает|хочет|просит|сказал|спросил)\b | المستخدم\s+(?:يسأل|يريد|يطلب)""",
    regex.VERBOSE | regex.IGNORECASE,
)


@check("no_think_leak", Params)
def no_think_leak(reply: Reply, params: Params) -> CheckResult:
    """No thinking in any text: neither tags of any vendor, nor reasoning that lost them.

    Untagged reasoning is known by what it speaks of: the user in the third person, the rules, the reply as a task. "Let
    me think." before an answer, and a calculation that is told to the user, are talk.
    """
    for text in reply.texts:
        if found := _MARKS.search(text) or _OPENS.search(text) or _OF_THE_USER.search(text):
            return failed(f"thinking {found.group().strip()!r}")
    return PASSED
