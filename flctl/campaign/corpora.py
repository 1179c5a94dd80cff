"""The demo's two private corpora: Italian and Czech prose that a small seeded grammar makes up, so that nothing is
downloaded and nobody's text is used. The sentences are grammatical; what they tell is up to the dice."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

DOCUMENTS = 28
PARAGRAPHS = 6


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split("|"))


def _sorted_entries(**kinds: str) -> tuple[tuple[str, int], ...]:
    """Every entry with the place of its kind among `kinds`."""
    return tuple((entry, place) for place, text in enumerate(kinds.values()) for entry in _entries(text))


def _forms(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(entry.split("/")) for entry in _entries(text))


ITALIAN_WHO = _sorted_entries(
    singular="""il vecchio pescatore | la maestra | il fornaio | la zia Giulia | il capostazione | la giovane pittrice
    | il nonno | la vicina di casa | lo zio Andrea | il sindaco | la figlia del medico | un viaggiatore stanco
    | qualcuno | l'orologiaio | la padrona del caffè""",
    plural="""i bambini | le ragazze del coro | i marinai | gli studenti | le sorelle | i contadini della valle
    | due amici | gli operai""",
)
# present singular / present plural / imperfect singular / imperfect plural / participle after "ha", "hanno"
ITALIAN_DOES = _forms(
    """compra/comprano/comprava/compravano/comprato | guarda/guardano/guardava/guardavano/guardato
    | porta/portano/portava/portavano/portato | cerca/cercano/cercava/cercavano/cercato
    | dipinge/dipingono/dipingeva/dipingevano/dipinto | prepara/preparano/preparava/preparavano/preparato
    | vende/vendono/vendeva/vendevano/venduto | dimentica/dimenticano/dimenticava/dimenticavano/dimenticato
    | trova/trovano/trovava/trovavano/trovato | nasconde/nascondono/nascondeva/nascondevano/nascosto
    | descrive/descrivono/descriveva/descrivevano/descritto | aspetta/aspettano/aspettava/aspettavano/aspettato
    | chiede/chiedono/chiedeva/chiedevano/chiesto | sceglie/scelgono/sceglieva/sceglievano/scelto"""
)
ITALIAN_WHAT = _sorted_entries(
    masculine="il pane | un cappello | il libro | un tavolo | il quadro | un cavallo | lo specchio | il vino",
    feminine="la barca | una lettera | la chitarra | una bicicletta | la lampada | una coperta | la minestra",
    masculines="i fiori | dei biscotti | i vestiti | i formaggi | gli occhiali | dei racconti",
    feminines="le mele | delle castagne | le fotografie | le chiavi | delle storie",
)
# the four endings, in the order of ITALIAN_WHAT's kinds
ITALIAN_LIKE = _forms(
    """rosso/rossa/rossi/rosse | nuovo/nuova/nuovi/nuove | antico/antica/antichi/antiche | caldo/calda/caldi/calde
    | piccolo/piccola/piccoli/piccole | leggero/leggera/leggeri/leggere | semplice/semplice/semplici/semplici
    | meraviglioso/meravigliosa/meravigliosi/meravigliose | azzurro/azzurra/azzurri/azzurre | dolce/dolce/dolci/dolci
    | dimenticato/dimenticata/dimenticati/dimenticate | prezioso/preziosa/preziosi/preziose"""
)
ITALIAN_WHERE = _entries(
    """al mercato | in cucina | sulla riva del fiume | vicino alla stazione | davanti alla chiesa | nella piazza grande
    | sotto il ponte | in fondo alla strada | nel cortile della scuola | tra gli ulivi | lungo la spiaggia | in città
    | dietro il vecchio mulino | ai piedi della montagna | nella bottega all'angolo | sul treno per Bologna | al porto
    | sulla terrazza | nel giardino della nonna | dall'altra parte del lago"""
)
ITALIAN_WHEN = _entries(
    """ieri mattina | ogni domenica | dopo la pioggia | prima di cena | verso sera | durante l'inverno | all'alba
    | una volta al mese | nel pomeriggio | quasi sempre | lunedì scorso | a mezzogiorno | qualche anno fa | d'estate
    | quella notte | tutti i giorni | il primo giorno di aprile"""
)
ITALIAN_WHY = _entries(
    """faceva ancora freddo | il mare era calmo | non c'era più tempo | la strada era lunga | pioveva da tre giorni
    | nessuno lo sapeva | la luna era già alta | le campane suonavano | tutti avevano fame | la verità era un'altra
    | la festa stava per cominciare | il vento veniva da nord | bisognava fare in fretta | la casa era piena di gente"""
)
ITALIAN_SAID = _entries(
    """Chi va piano va sano e va lontano, | Non è più come una volta, | Domani sarà una bella giornata,
    | Perché non resti a cena? | Così va il mondo, | La pazienza è la virtù dei forti, | Andiamo, che è tardi!
    | Questa è la più bella di tutte, | Non ho mai visto niente di simile, | Chi cerca trova, | Il caffè è già pronto,
    | Ci vediamo giovedì, se non piove,"""
)
ITALIAN_TITLE = _entries("La storia di | Il giorno di | Ricordi di | Una lettera per | Le parole di | Il segreto di")
ITALIAN_NAME = _entries("Giulia | Andrea | Chiara | Matteo | Lucia | Niccolò | Caterina | Pietro")

CZECH_WHO = _sorted_entries(
    masculine="""starý rybář | pekař | přednosta stanice | dědeček | strýc Jiří | starosta | unavený poutník | někdo
    | hodinář | můj bratr""",
    feminine="paní učitelka | teta Božena | mladá malířka | naše sousedka | lékařova dcera | majitelka kavárny",
    masculines="námořníci | studenti | sedláci z údolí | dva přátelé | dělníci",
    feminines="děti | dívky ze sboru | sestry",
)
CZECH_PAST = ("", "a", "i", "y")  # the participle's endings, in the order of CZECH_WHO's kinds
# present singular / present plural / participle without its ending
CZECH_DOES = _forms(
    """kupuje/kupují/kupoval | pozoruje/pozorují/pozoroval | nese/nesou/nesl | hledá/hledají/hledal
    | maluje/malují/maloval | připravuje/připravují/připravoval | prodává/prodávají/prodával | čistí/čistí/čistil
    | zapomíná/zapomínají/zapomínal | nachází/nacházejí/nacházel | schovává/schovávají/schovával
    | popisuje/popisují/popisoval | chválí/chválí/chválil | opravuje/opravují/opravoval | vidí/vidí/viděl"""
)
CZECH_WHAT = _sorted_entries(  # all in the accusative; the last kind is the neuter and every plural
    masculine="chléb | klobouk | dopis | stůl | obraz | hrnec | člun | kabát",
    feminine="loďku | knihu | kytaru | lampu | přikrývku | polévku | zahradu | píseň",
    others="""kolo | zrcadlo | víno | květiny | koláče | šaty | švestky | kaštany | fotografie | klíče | příběhy
    | brýle""",
)
CZECH_LIKE = _entries(
    """červen | nov | star | mal | lehk | nádhern | tepl | prost | zapomenut | modr | vzácn | sladk | dřevěn | žlut"""
)
CZECH_LIKE_ENDINGS = ("ý", "ou", "é")  # in the order of CZECH_WHAT's kinds
CZECH_WHERE = _entries(
    """na trhu | v kuchyni | na břehu řeky | blízko nádraží | před kostelem | na velkém náměstí | pod mostem
    | na konci ulice | na školním dvoře | mezi jabloněmi | podél rybníka | ve městě | za starým mlýnem | na úpatí hory
    | v krámku na rohu | ve vlaku do Přerova | v přístavu | na půdě | v babiččině zahradě | na druhé straně jezera"""
)
CZECH_WHEN = _entries(
    """včera ráno | každou neděli | po dešti | před večeří | k večeru | v zimě | za úsvitu | jednou za měsíc
    | odpoledne | skoro vždycky | minulé úterý | v poledne | před několika lety | v létě | té noci | každý den
    | prvního dubna"""
)
CZECH_WHY = _entries(
    """bylo ještě chladno | hladina byla klidná | nezbýval už žádný čas | cesta byla dlouhá | pršelo už třetí den
    | nikdo o tom nevěděl | měsíc stál vysoko | zvonily zvony | všichni měli hlad | slavnost měla brzy začít
    | od severu foukal vítr | bylo třeba si pospíšit | dům byl plný lidí | pravda byla jiná"""
)
CZECH_SAID = _entries(
    """Kdo jde pomalu, dojde daleko, | Už to není jako dřív, | Zítra bude krásný den, | Proč nezůstaneš na večeři?
    | Tak už to na světě chodí, | Trpělivost růže přináší, | Pojďme, je už pozdě! | Tahle je ze všech nejhezčí,
    | Něco takového jsem ještě neviděla, | Kdo hledá, najde, | Káva je už hotová,
    | Uvidíme se ve čtvrtek, když nebude pršet,"""
)
CZECH_TITLE = _entries("Jak žije | Den, kdy přijela | O čem přemýšlí | Proč mlčí | Kam odešla | Co ještě neví")
CZECH_NAME = _entries("Božena | Anežka | Žofie | Ludmila | Kateřina | Eliška | Jiřina | Růžena")


def write_corpus(language: str, folder: Path, *, seed: int) -> None:
    """Write the documents of `italian` or `czech`, about 80 KB of UTF-8, into `folder`; same seed, same bytes."""
    title, sentence = GRAMMARS[language]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, DOCUMENTS + 1):
        dice = random.Random(f"{seed}/{language}/{number}")
        paragraphs = [title(dice), *(_paragraph(dice, sentence) for _ in range(PARAGRAPHS))]
        text = "\n\n".join(paragraphs) + "\n"
        (folder / f"{language}-{number:02}.txt").write_bytes(text.encode())


def _paragraph(dice: random.Random, sentence: Callable[[random.Random], str]) -> str:
    sentences = [sentence(dice) for _ in range(dice.randint(4, 7))]
    return " ".join(text[0].upper() + text[1:] for text in sentences)


def _italian_title(dice: random.Random) -> str:
    return f"{dice.choice(ITALIAN_TITLE)} {dice.choice(ITALIAN_NAME)}"


def _italian_clause(dice: random.Random) -> tuple[str, str]:
    """Somebody, and what they did to something."""
    (who, plural), does, (what, kind) = dice.choice(ITALIAN_WHO), dice.choice(ITALIAN_DOES), dice.choice(ITALIAN_WHAT)
    did = dice.choice([does[2 + plural], ("ha ", "hanno ")[plural] + does[4]])
    like = " " + dice.choice(ITALIAN_LIKE)[kind] if dice.random() < 0.6 else ""
    return who, f"{did} {what}{like}"


def _italian(dice: random.Random) -> str:
    (who, did), (other, also) = _italian_clause(dice), _italian_clause(dice)
    where, when, why = dice.choice(ITALIAN_WHERE), dice.choice(ITALIAN_WHEN), dice.choice(ITALIAN_WHY)
    said, name = dice.choice(ITALIAN_SAID), dice.choice(ITALIAN_NAME)
    neighbour, plural = dice.choice(ITALIAN_WHO)
    does, (what, _) = dice.choice(ITALIAN_DOES)[plural], dice.choice(ITALIAN_WHAT)
    return dice.choice(
        [
            f"{when} {who} {did} {where}.",
            f"{who} {did} {where}, perché {why}.",
            f"{where} {who} {did}, mentre {other} {also}.",
            f"quando {why}, {who} {did}.",
            f"però {why}, così {who} {did} {where}.",
            f"«{said}» ha detto {name}, ma {other} {also}.",
            f"si dice che {neighbour} {does} {what} {where}.",
            f"né {name} né gli altri capivano perché {who} {did}.",
            f"oggi invece {neighbour} {does} {what}, e {name} lo sa.",
        ]
    )


def _czech_title(dice: random.Random) -> str:
    return f"{dice.choice(CZECH_TITLE)} {dice.choice(CZECH_NAME)}"


def _czech_clause(dice: random.Random) -> tuple[str, str]:
    """Somebody, and what they did to something."""
    (who, kind), does, (what, case) = dice.choice(CZECH_WHO), dice.choice(CZECH_DOES), dice.choice(CZECH_WHAT)
    like = dice.choice(CZECH_LIKE) + CZECH_LIKE_ENDINGS[case] + " " if dice.random() < 0.6 else ""
    return who, f"{does[2]}{CZECH_PAST[kind]} {like}{what}"


def _czech(dice: random.Random) -> str:
    (who, did), (other, also) = _czech_clause(dice), _czech_clause(dice)
    where, when, why = dice.choice(CZECH_WHERE), dice.choice(CZECH_WHEN), dice.choice(CZECH_WHY)
    said, name = dice.choice(CZECH_SAID), dice.choice(CZECH_NAME)
    neighbour, kind = dice.choice(CZECH_WHO)
    does, (what, _) = dice.choice(CZECH_DOES)[kind >= 2], dice.choice(CZECH_WHAT)
    return dice.choice(
        [
            f"{who} {when} {did} {where}.",
            f"{who} {did} {where}, protože {why}.",
            f"{other} {where} {also}, zatímco {who} {did}.",
            f"když {why}, {who} {did}.",
            f"ale {why}, a proto {who} {did} {where}.",
            f"„{said}“ řekla {name}, ale {other} {also}.",
            f"říká se, že {neighbour} {where} {does} {what}.",
            f"ani {name}, ani ostatní nechápali, proč {who} {did}.",
            f"dnes však {neighbour} {does} {what} a {name} to ví.",
        ]
    )


GRAMMARS: Mapping[str, tuple[Callable[[random.Random], str], Callable[[random.Random], str]]] = {
    "italian": (_italian_title, _italian),
    "czech": (_czech_title, _czech),
}
