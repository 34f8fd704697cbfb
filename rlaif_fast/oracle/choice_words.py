"""The words used to read a reply to a multiple-choice question; the rules that use them are in `choices`.

Each pattern that is not for English names its language. A head is the clause before a label, a tail the one after it.
"""

from __future__ import annotations

import re

# What the words around a label make of it, weakest first.
WORD = -2  # no label at all: an article, a pronoun, a name
REJECTED = -1  # "not A", "A is wrong"
NONE = 0  # a label that nothing is said about
HEDGED = 1  # "A is also possible"
MAYBE = 2  # "maybe B": a pick if there is no other label beside it
HEAD = 3  # at the head of a clause, or alone in it
VERDICT = 4  # "B is correct"
ANSWER = 5  # "the answer is B"
FINAL = 6  # "the final answer is B"

_LATIN = "A-Za-z0-9_\u00c0-\u024f"
LABEL = re.compile(
    rf"(?<![{_LATIN}'’])(?<![{_LATIN}]-)(?P<open>[(\[{{]\s?)?"
    rf"(?:(?P<upper>[A-Z]{{1,2}})|(?P<lower>[a-z]))(?![{_LATIN}]|['’][A-Za-z]|-[A-Za-z])"
    r"(?P<close>\s?[)\]}:]|\.(?=\s[a-z]|\s?[✗❌×✘✓✔✅]))?"
)
LABEL_NOUN = (
    r"(?:the\s+)?(?:option|choice|answer|ans|letter|alternative|opción|opcion|opção|opcao|opzione|respuesta|réponse|"
    r"reponse|antwort|risposta|resposta|antwoord|вариант|ответ|选项|選項|选|選|答案|答|選択肢|答え|정답|답|cevap|seçenek|"
    r"đáp án|jawaban|pilihan|उत्तर|विकल्प|الإجابة|الجواب|الخيار|คําตอบ|ข้อ)"
)
PLACE_NOUN = re.compile(  # "option 3" may be the third
    r"option|choice|alternative|number|no|nr|opción|opcion|opção|opcao|opzione|вариант|seçenek|pilihan|विकल्प|الخيار"
)
JOINS = ("and", "or", "but")
LABEL_LEAD = re.compile(rf"{LABEL_NOUN}\s*[:.\-]?\s*$", re.IGNORECASE)
JOINED = re.compile(
    r"\s*(?:[,/&+|、，]|(?:[,、，]\s*)?(?:and/or|or|and|nor|as well as|und|oder|y|o|u|et|ou|e|ed|od|и|или|і|або|"
    r"和|或者?|与|及|"
    r"と|か|や|또는|및|과|와|이나|나|ve|veya|ya da|atau|dan|hoặc|và|หรือ|และ|या|और|أو|و))"
    r"\s*(?:option |choice |answer )?",
    re.IGNORECASE,
)
REVISION = re.compile(
    r"\bwait\b|\bactually\b|\bon second thou?ghts?\b|\bcorrection\b|\bscratch that\b|\bi mean\b|\bno,|\bsorry\b|"
    r"\bhmm+\b|\blet me (?:re)?(?:-?check|consider|think)\b|等等|いや|아니요",
    re.IGNORECASE,
)

_BOUNDARY = re.compile(
    r"(?<!\bans)(?<!\bAns)[.](?!\d)|[!?;。！？；।]|(?<!:)\n|"
    r"[,，、](?!\s*(?:in my|i (?:think|believe|guess)|therefore|then|hence|thus|is|are|of course|as|based|given)\b)|"
    r"(?<=아니라)|(?<=아니고)|(?<=ではなく)|(?<=でなく)|"
    r"(?<!anything )(?<!everything )(?<!nothing )(?<!none )(?<!all )\bbut\b|"
    r"\b(?:so|hence|therefore|thus|because|since|while|whereas|however|sondern|aber|sino|pero|mais|donc|ma|quindi|"
    r"portanto|mas|nên|jadi|а)\b|但是?|而是|所以|因此|因为|ので|だから|따라서",
    re.IGNORECASE,
)


def last_clause(text: str) -> str:
    """The end of `text` after the last clause boundary."""
    start = 0
    for match in _BOUNDARY.finditer(text[-400:]):
        start = match.end()
    return text[-400:][start:]


def first_clause(text: str) -> tuple[str, str]:
    """The part of `text` before the first clause boundary, and that boundary."""
    match = _BOUNDARY.search(text[:400])
    return (text[:400], "") if match is None else (text[: match.start()], match.group())


_QUALITY = (
    r"(?:correct|right|best|true|final|proper|matching|chosen|selected|appropriate|accurate|likely|suitable)"
)
_NOUN = (
    rf"\b(?:(?:answer|ans|response|solution|prediction|conclusion|verdict|guess|pick)(?!\s*(?:options|choices)|s\b)|"
    rf"{_QUALITY}\s+(?:option|choice|letter|one|alternative|description|statement|match|fit)|"
    r"(?:correct|right)(?=\s*:)|(?:option|choice|letter)(?=\s*(?:is\b|:|=))|"
    r"respuesta|opción correcta|réponse|reponse|bonne option|antwort|lösung|risposta|resposta|alternativa correta|"
    r"antwoord|svaret|svar|vastaus|válasz|odpowied[zź]|odpověď|răspuns(?:ul)?|вариант|ответ(?:ом)?|відповідь|"
    r"απάντηση|"
    r"cevap|cevabı|yanıt|đáp án|jawaban(?:nya)?)\b|"
    r"答案|答え|正解|解答|回答|正确选项|正確選項|选项|選項|정답|답변|답|उत्तर|जवाब|উত্তর|ตอบ|الإجابة|الاجابة|"
    r"الجواب|إجابة|جواب|پاسخ|תשובה|答"
)
_VERB = (
    r"\b(?:choose|pick|select|chose|picked|selected|choosing|go(?:ing)? (?:with|for)|opt(?:ing)? for|"
    r"vote for|settle on|"
    r"i['’]?d say|i would say|i say|i (?:think|believe|guess|suspect)(?: that)?(?: it(?:['’]s| is))?|wähle|nehme|"
    r"elijo|escojo|elegiría|choisis|choisirais|scelgo|escolho|выбираю|wybieram|seçiyorum|chọn|pilih|memilih)\b|"
    r"选择?|選(?:擇|ぶ)?|应选|應選|故选|เลือก"
)
_COPULA = (
    r"(?<![A-Za-z])(?:is|was|are|be|becomes|remains|seems|equals|points to|corresponds to|es|sería|est|"
    r"serait|ist|lautet|"
    r"wäre|è|é|seria|sarebbe|adalah|là|är|er|on|to|jest|je|este|είναι|это)\b|[:=]|是|为|為|は|が|은|는|है|হল|হলো|"
    r"คือ|هي|هو|است|היא|הוא"
)
_FILLER = (
    r"(?:the|an?(?=\s+option)|most|likely|probably|definitely|clearly|certainly|obviously|surely|therefore|"
    r"thus|hence|still|"
    r"indeed|simply|be|to|it|is|would|should|must|will|has|have|with|number|option|choice|letter|answer|here|"
    r"la|el|le|die|der|das|il|o|a(?=\s+(?:opção|letra|alternativa))|opción|letra|alternativa|opzione|opção|"
    r"lettre|lettera|"
    r"buchstabe|вариант|буква|wohl|probablemente|sans doute|seçeneği|şıkkı|phương án|pilihan|opsi|option|svar|"
    r"应该|應該|应当|就|选项|選項|选|選|是|विकल्प|الخيار|ข้อ|선택지|選択肢|보기)"
)
CUE = re.compile(
    rf"(?:(?:{_NOUN})(?:[^\n.;!?]{{0,60}}?(?:{_COPULA}))?|(?:{_VERB}))[\W_]*(?:{_FILLER}(?![A-Za-z])[\W_]*)*$",
    re.IGNORECASE,
)
FINAL_CUE = re.compile(
    r"\bfinal(?:ly)?\b|\bin conclusion\b|\bin summary\b|最终|最終|最后|最後", re.IGNORECASE
)
FILLED = re.compile(
    r"[\W_]*(?:(?:it|that|this|they|which|mine|yes|ok|okay|sure|well|so|then|must|has|have|to|be|is|was|"
    r"would|should|will|"
    r"['’]s|['’]d|probably|definitely|clearly|certainly|maybe|perhaps|possibly|obviously|likely|most|just|"
    r"i|im|i['’]m|am|"
    r"pretty|quite|think|guess|believe|say|going|with|option|choice|letter|answer|the(?=\s+(?:letter|option|choice|answer|one))|one|for|my|me|"
    r"es|ist|sind|das|die|der|c['’]est|la|le|el|lo|è|é|это|se trata de|a letra|letra|opción|opção|het|dit|"
    r"det|är|är det|her|bu|"
    r"它是|是|应该|應該|それは|これは|это|そう|아마도?|그것은)[\W_]*)+",
    re.IGNORECASE,
)

_NOT = r"(?:\bnot\b|n['’]t\b|\bnever\b|\bneither\b|\bnor\b|\bcannot\b)"
NEGATED_HEAD = re.compile(
    rf"{_NOT}[^\n]{{0,60}}$|"
    r"\b(?:(?:anything|everything|nothing|none|all) but|rather than|instead of|as opposed to|other than|"
    r"except(?: for)?|excluding|besides|unlike|without|versus|vs\.?|than|against|"
    r"rul(?:e|es|ed|ing) out|eliminat\w*|exclud\w*|reject\w*|discard\w*|dismiss\w*|discount\w*|"
    r"wrong|incorrect|false|"
    r"nicht|kein\w*|no (?:es|puede ser|la|creo)|n['’]est pas|pas|não(?: é)?|non(?: è)?|не|nie|niet|ikke|inte|ei ole|"
    r"không phải|không|bukan|descart\w*|élimin\w*|исключ\w*)\b[^\n]{0,30}$|"
    r"(?:不是|不选|不選|不会是|并非|而非|排除|不|ไม่ใช่|नहीं|ليست?|غير|לא)[^\n]{0,12}$",
    re.IGNORECASE,
)
_WRONG = (
    r"(?:not\b|n['’]t\b|never\b|cannot\b|wrong\b|incorrect\b|false\b|impossible\b|unlikely\b|out\b|"
    r"eliminated\b|excluded\b|"
    r"ruled\b|rejected\b|contradict\w*|falsch\b|nicht\b|fals[oa]\b|fausse\b|faux\b|pas\b|incorrect[ao]\b|"
    r"incorret[ao]\b|"
    r"errad[ao]\b|sbagliat[ao]\b|неверн\w*|неправильн\w*|salah\b|bukan\b|sai\b|không\b|fout\b|fel\b|yanlış\b|değil\b)"
)
NEGATED_TAIL = re.compile(
    r"[\W_]*(?:(?:can|could|do|does|did|is|are|was|were|wo|would|should|must|has|have|ca)n?['’]t\b|cannot\b|"
    r"(?:is|are|was|were|seems?|looks?|sounds?|would|must|can|could|does|do|did|has|have|will|should|may|might|gets?|"
    rf"ist|sind|es|son|est|n['’]est|sont|è|é|non|são|sono|no)\b(?:\s+(?!because|since|correct|right|true|best|"
    rf"the)\w+){{0,2}}?\s+{_WRONG})|"
    rf"[\W_]*(?:wrong|incorrect|false|falsch|değil|yanlış|неверн\w*|неправильн\w*|salah|не подходит)\b|"
    r"\s*(?:是|也|都|选项|選項)?(?:不对|不對|不是|错|錯|不正确|不正確|不符合|不可能|不行)|"
    r"\s*(?:は|が|も)?(?:では?な|じゃな|でな|違|間違|誤|不正解)|\s*(?:은|는|이|가|도)?\s*(?:아니|아닌|틀)|\s*[✗❌×✘]|\s*(?:ไม่|ผิด)|"
    r"\s*(?:सही )?नहीं",
    re.IGNORECASE,
)
HEDGED_TAIL = re.compile(
    r"[^\n]{0,40}\b(?:also|possible|possibly|plausible|too|as well|maybe|perhaps|might|could|may|both|"
    r"either)\b|[^\n]{0,6}也",
    re.IGNORECASE,
)
MAYBE_HEAD = re.compile(
    r"\b(?:maybe|perhaps|possibly|or|could be|might be|may be|alternatively)\b", re.IGNORECASE
)
VERDICT_TAIL = re.compile(
    r"[\W_]*(?:(?:is|are|was|would be|must be|has to be|seems|seems to be|looks|should be)\s+(?:\w+\s+){0,3}?"
    rf"(?:{_QUALITY}|answer|it|supported|what)\b|(?:best\s+|most\s+\w+\s+)?(?:fits|matches|describes|answers|"
    rf"applies)\b|"
    r"\s*[-:–—(=][\W_]*(?:correct|right|true|yes)\b|es\s+(?:la\s+)?(?:respuesta|correct|opción)|est\s+(?:la\s+)?(?:bonne|"
    r"correct|réponse)|"
    r"ist\s+(?:die\s+)?(?:richtig|korrekt|antwort)|è\s+(?:la\s+)?(?:risposta|corrett|giust)|"
    r"é\s+(?:a\s+)?(?:resposta|corret|cert)|"
    r"(?:is|är|er)\s+(?:juist|correct|goed|rätt|riktig)|—?\s*(?:верн|правильн)|doğru)|"
    r"\s*(?:是|才是|最)?(?:正确|正確|对的|對的|对|答案|符合)|\s*が(?:正解|正しい|答え|最も|適切)|\s*[이가]\s*(?:정답|맞|옳)|\s*[✓✔✅]|\s*सही",
    re.IGNORECASE,
)
HEAD_TAIL = re.compile(
    r"[\s\"'”’」]*(?:$|[.,:)\]\-–—=→(/]|(?:because|since|as|due|given|based|for|porque|parce|weil|denn|perché|"
    r"потому|car|"
    r"and not|not|rather than|instead of|as opposed to|i (?:think|believe|guess)|please|definitely|probably|"
    r"obviously|clearly|it is|olmalı|'?d[ıiuü]r)\b|"
    r"因为|因為|です|でしょう|だ|だと|と思|입니다|이다|이에요|예요|인|吧|。|है|ครับ|ค่ะ)",
    re.IGNORECASE,
)
ASKING = re.compile(
    r"[\W_]*(?:is|are|was|could|would|can|should|might|does|did|why|what|which|how|or|and|maybe|perhaps)\b",
    re.IGNORECASE,
)
DENIED = re.compile(r"\s*(?:no|nope|nein|non|nee|нет)\b|\s*(?:不|いいえ|아니)", re.IGNORECASE)  # after "A?"
CONDITION = re.compile(
    r"\b(?:if|unless|whether|suppose|assuming|between|either|both|wenn|si|se|falls|если)\b|如果|若|もし",
    re.IGNORECASE,
)

# These words after "A" or "a" make it a label: "A is", "A because"; any other word makes it an article.
_AFTER_A = re.compile(
    r"\s+(?:is|are|was|because|since|as|and|or|but|for|seems?|looks?|match(?:es)?|fits?|best|would|must|"
    r"should|can|cannot|"
    r"could|does|shows?|describes?|then|the|this|that|he|she|it|they|there|due|given|based|not|isn['’]t|can['’]t|"
    r"doesn['’]t|wasn['’]t|nor|which|please|definitely|probably|obviously|clearly|also|too|might|may|"
    r"ist|es|est|è|é|olmalı|değil|jest|är|неверн\w*|правильн\w*)\b",
    re.IGNORECASE,
)
_AFTER_I = re.compile(r"\s+(?:is|because|matches|fits|seems|looks)\b", re.IGNORECASE)
_NAME = re.compile(
    r"\b(?:vitamin|plan|team|player|grade|type|hepatitis|group|room|point|class|section|level|model|series|"
    r"exhibit|vehicle|"
    r"figure|person|gate|row|line|camera|part|scene|step|size|channel|lane|car|building|note|key|chord|runner)\s+$",
    re.IGNORECASE,
)


def is_article(token: str, tail: str) -> bool:
    """Whether "a" or "i" is a word of the sentence: another word follows it."""
    return (
        token.lstrip("([{ ") in ("a", "i")
        and re.match(r"\s+[^\W\d_]", tail) is not None
        and _AFTER_A.match(tail) is None
    )


def is_word(token: str, head: str, tail: str, *, led: bool) -> bool:
    """Whether a lone letter is a word or a name rather than a label.

    Args:
        token: The letter as written.
        head: The clause before it.
        tail: The clause after it.
        led: Whether an answering phrase leads to it.
    """
    letter = token.strip()
    latin = re.match(r"\s+[A-Za-z\u00c0-\u024f]", tail) is not None  # a word of a script with spaces follows
    if _NAME.search(head):
        return True
    if letter in ("A", "a", "I", "i"):
        after = _AFTER_A if letter in "Aa" else _AFTER_I
        if letter in "ai" and not led:
            return True
        return latin and after.match(tail) is None
    if letter.islower():
        if led:
            return latin and _AFTER_A.match(tail) is None
        return bool(head.strip()) or HEAD_TAIL.match(tail) is None
    return False


# Single words, for the options' texts.
NEGATION = re.compile(
    r"not|no|never|neither|nor|cannot|isn|aren|wasn|doesn|don|didn|t|without|except|instead|than|wrong|incorrect|excluding|"
    r"unlike|nicht|kein|keine|pas|não|non|не"
)
SMALL_WORD = re.compile(r"yes|no|not|none|a|an|i|it|all|both|neither|either|maybe")
