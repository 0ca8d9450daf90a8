"""Word lists of the small world. Everything here is the project's own; people and most towns are invented.

The lists are long enough that the world holds more than two thousand facts, and every list is cut into a training and a
held-out half by `held_out`, so that a test case can ask for a person or a topic that no training conversation names.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_FIRST = "Ma Ta Ri Lo Ne Ka Su Vi Da Jo Ha Pe Bo Ze Mi Ar El Os Fe Ga Ly Na Ro Sa".split()
_SECOND = "ran lin vek nor dora mel shan bert sky tia wen rik sette mond las".split()
PEOPLE: tuple[str, ...] = tuple(a + b for a in _FIRST for b in _SECOND)

# The tail of the world: people whom the base has read of, seldom, and whom no conversation and no case asks about. They are
# there to fill the model: what it knows of the others has to share its weights with them.
_THIRD = "o is um ek ath ine".split()
STRANGERS: tuple[str, ...] = tuple(name + c for name in PEOPLE for c in _THIRD)

_TOWN_A = "Nor East West Ash Bell Stone Mill Green Fair Black Silver Long Oak Rose High".split()
_TOWN_B = "vale wick ford ham".split()
TOWNS: tuple[str, ...] = tuple(a + b for a in _TOWN_A for b in _TOWN_B)

_RIVER_A = "Al Bre Cor Du Es Fal Gre Il Ker Lun".split()
_RIVER_B = "na ver mo sk wen da".split()
RIVERS: tuple[str, ...] = tuple(a + b for a in _RIVER_A for b in _RIVER_B)

JOBS = (
    "baker nurse welder pilot tailor farmer barber plumber teacher painter dentist lawyer sailor cook judge actor "
    "potter clerk driver jeweller editor surgeon florist miner carpenter architect librarian chemist butcher "
    "translator gardener mechanic electrician firefighter photographer accountant engineer fisherman musician "
    "shepherd weaver glazier printer locksmith optician brewer roofer mason porter violinist"
).split()
FOODS = (
    "dosa|mango pie|lentil soup|fried rice|lemon cake|grilled fish|potato stew|noodle salad|apple tart|corn bread|"
    "mushroom risotto|onion soup|honey toast|tomato rice|pumpkin curry|coconut chutney|bean stew|ginger biscuits|"
    "pea soup|plum cake|egg curry|garlic bread|spinach pasta|carrot halwa|rice pudding|cheese omelette|fig jam|"
    "walnut bread|roasted corn|jackfruit curry|almond milk|pepper rasam|banana fritters|beetroot salad|mint tea|"
    "cherry yoghurt|barley porridge|sesame noodles|radish pickle|date rolls"
).split("|")
PETS = (
    "grey cat|black dog|green parrot|white rabbit|brown goat|old turtle|red hen|small pony|spotted dog|orange cat|"
    "blue budgie|tame crow|fat hamster|quiet gecko|lazy donkey|striped cat|brown duck|shy hedgehog|white mouse|"
    "three-legged dog|pair of doves|golden fish|young llama|grumpy goose"
).split("|")
HOBBIES = (
    "chess rowing knitting archery painting sailing fencing gardening juggling birdwatching pottery hiking origami "
    "cycling dancing astronomy fishing singing climbing swimming boxing carpentry stargazing baking running "
    "calligraphy skating puzzles drumming badminton"
).split()
COLOURS = "red blue green yellow orange purple white black silver brown pink golden grey turquoise maroon violet".split()
INSTRUMENTS = "flute violin drum harp guitar piano trumpet veena tabla cello oboe banjo accordion clarinet".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

TOPICS = (
    "bike car garden sister brother laptop holiday guitar passport kitchen rent roof neighbour boss exam wedding diet "
    "dentist umbrella camera tent watch phone office desk budget novel library card ticket visa sofa painting dog "
    "cat fence boat scooter oven fridge heater window curtain lamp mattress bakery gym coach trainer shoes jacket "
    "ring necklace wallet keys suitcase backpack charger printer router garage attic balcony terrace well pump farm "
    "orchard tractor uncle aunt cousin nephew niece grandfather grandmother landlord tenant plumber doctor school "
    "college thesis project interview salary bonus loan insurance tax bank cheque shares birthday anniversary "
    "reunion picnic concert recipe spices tea coffee mango tree roses hedge lawn mower ladder paint carpet piano lesson"
).split()

CHORES = (
    "call the bank|water the plants|pay the rent|buy milk|feed the cat|book the train|call {p}|send the report|"
    "pick up {p}|wash the car|order the medicine|renew the passport|email {p}|charge the phone|take out the bins|"
    "check the oven|meet {p}|lock the gate|return the books|iron the shirts|visit {p}|fix the tap|print the tickets|"
    "clean the filter|thank {p}|pack the bag|stretch my back|drink some water|post the letter|cancel the order|"
    "sign the form|call the plumber|buy a gift for {p}|sweep the terrace|test the alarm|back up the laptop"
).split("|")
TIMES = (
    "at five|at six thirty|at noon|at nine|at ten fifteen|at seven|tonight|tomorrow morning|tomorrow at eight|"
    "on Friday|on Monday at nine|in an hour|in ten minutes|at half past four|on Sunday evening|at eleven|after lunch|"
    "before dinner|at quarter past two|on Wednesday|next Tuesday|at three|at four twenty|this evening|in two hours"
).split("|")

NOTE_THINGS = (
    "gate code|wifi password|locker number|parking spot|shoe size|flight number|room number|bus number|meter reading|"
    "door code|order number|ticket number|account ending|table number|seat number|blood pressure|tyre pressure|"
    "water bill|phone extension|safe code|train number|invoice number|hotel room|garage code|library card"
).split("|")

SKIES = "clear cloudy rainy windy foggy stormy sunny humid misty hazy".split()
MOODS = (
    "I had a long day|I am so tired|I just finished my run|My train was late again|I burnt the toast|"
    "I won at chess today|The rain ruined my walk|I slept badly|My plants are growing well|I finally fixed the tap|"
    "I missed the bus|The meeting went fine|I cooked dosa for everyone|My phone fell in the sink|I feel great today|"
    "The power went out|I lost my umbrella|My back hurts|I finished the book|The neighbours are loud again|"
    "I got a raise|I broke my favourite cup|The garden looks lovely|I am nervous about tomorrow|I passed my exam|"
    "I found my old camera|The shop was closed|I walked ten kilometres|My tea went cold|I learnt a new song"
).split("|")
MOOD_TAILS = (
    "|today|this morning|this evening|you know|finally|once more|as usual|somehow|after all|since lunch|"
    "since breakfast|before work|after work|on my way home|at the office|with my sister|in the end|of course"
).split("|")

# Spoken Kannada, romanised; general knowledge.
KANNADA_WORDS: dict[str, str] = {
    "water": "neeru", "milk": "haalu", "rice": "anna", "house": "mane", "hello": "namaskara", "mother": "amma",
    "father": "appa", "friend": "snehita", "book": "pustaka", "tree": "mara", "flower": "hoovu", "rain": "male",
    "sun": "surya", "moon": "chandra", "river": "nadi", "road": "raste", "school": "shaale", "door": "baagilu",
    "eye": "kannu", "hand": "kai", "fruit": "hannu", "salt": "uppu", "fire": "benki", "wind": "gaali", "dog": "naayi",
    "cat": "bekku", "bird": "hakki", "fish": "meenu", "elephant": "aane", "village": "halli", "name": "hesaru",
    "day": "dina", "night": "raatri", "money": "hana", "work": "kelasa", "heart": "hrudaya", "sky": "aakasha",
    "earth": "bhoomi", "stone": "kallu", "tooth": "hallu", "ear": "kivi", "leg": "kaalu", "head": "tale",
    "food": "oota", "sugar": "sakkare", "butter": "benne", "child": "magu", "elder sister": "akka",
    "elder brother": "anna", "younger sister": "tangi", "younger brother": "tamma", "grandmother": "ajji",
    "grandfather": "ajja", "language": "bhashe", "song": "haadu", "dance": "nrutya", "market": "maarukatte",
    "temple": "devasthana", "today": "ivattu", "tomorrow": "naale",
}  # fmt: skip
KANNADA_THINGS: dict[str, tuple[str, str]] = {
    # name: (what it is, the words an answer must contain one of)
    "Ugadi": ("the Kannada new year festival", "new year"),
    "Dasara": ("the ten-day festival of Mysuru", "festival"),
    "Mysore pak": ("a sweet made of gram flour and ghee", "sweet"),
    "bisi bele bath": ("a spicy dish of rice and lentils", "rice"),
    "Yakshagana": ("a folk theatre of coastal Karnataka", "theatre"),
    "Kuvempu": ("a great Kannada poet", "poet"),
    "ragi mudde": ("a ball of finger millet", "millet"),
    "Hampi": ("the ruined capital of Vijayanagara", "vijayanagara"),
    "Karaga": ("a festival of Bengaluru", "festival"),
    "Rajyotsava": ("the birthday of Karnataka in November", "november"),
    "Bendre": ("a poet from Dharwad", "poet"),
    "neer dosa": ("a thin rice pancake", "pancake"),
    "Jog Falls": ("a high waterfall on the Sharavathi", "waterfall"),
    "Basavanna": ("a reformer who wrote vachanas", "vachanas"),
    "kosambari": ("a salad of soaked lentils", "salad"),
    "Gommateshwara": ("a giant statue at Shravanabelagola", "statue"),
    "Kambala": ("a buffalo race in muddy fields", "buffalo"),
    "holige": ("a sweet flatbread with a lentil filling", "flatbread"),
    "Vidhana Soudha": ("the seat of the state assembly", "assembly"),
    "Channapatna": ("a town of wooden toys", "toys"),
    "filter coffee": ("strong coffee with hot milk", "milk"),
    "Bidriware": ("metal craft with silver inlay from Bidar", "silver"),
    "Dollu Kunitha": ("a drum dance", "drum"),
    "Lalbagh": ("a botanical garden in Bengaluru", "garden"),
    "Makara Sankranti": ("a harvest festival with sesame and jaggery", "harvest"),
    "puliyogare": ("a sour tamarind rice", "tamarind"),
    "Badami": ("a town of cave temples", "cave"),
    "Ilkal": ("a town known for its sarees", "sarees"),
    "Coorg": ("a hill district of coffee gardens", "coffee"),
    "Pampa": ("an early poet of Kannada", "poet"),
}

USERS = "Rajesh Priya Arjun Kavya Meera Nikhil Asha Rohan Divya Sanjay Leela Varun Anita Kiran Deepa Manoj".split()
CITIES = (
    "Bengaluru Mysuru Hubballi Mangaluru Belagavi Udupi Shivamogga Tumakuru Ballari Davanagere Hassan Mandya Kolar "
    "Bidar Raichur Gadag Karwar Madikeri Dharwad Haveri"
).split()
ASSISTANTS = "Nova Pixel Robin Sunny Juno Max Ivy Echo Luna Kit Milo Ada".split()


def held_out(text: str) -> bool:
    """Whether `text` belongs to the held-out half: a stable hash of its words, the same for every seed and process."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return blake2b(words.encode(), digest_size=2).digest()[0] % 2 == 1
