"""Texts of several domains with what they say, made from a seed.

Every domain draws its values first and writes the text around them, so the right answer is known by construction. A
field may be left out of the text; then the right answer is null, and giving one is inventing it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """A text and its fields: name to (what it is, rule, value); the value is None where the text does not say."""

    text: str
    fields: dict[str, tuple[str, str, Any]]


_PEOPLE = ("Rajesh Gowda", "Meera Iyer", "Anil Kulkarni", "Zoë Brandt", "Lakshmi Hegde", "Tomás Ortega", "Grace Mwangi")
_CITIES = ("Mysuru", "Hassan", "Bengaluru", "Lyon", "Graz", "Porto", "Nairobi")
_MONTHS = ("January", "March", "April", "June", "August", "September", "November")
_NUMBERS = {"January": 1, "March": 3, "April": 4, "June": 6, "August": 8, "September": 9, "November": 11}


def _date(draw: Random) -> tuple[str, str]:
    """A date as people write it, and in ISO 8601."""
    month, day, year = draw.choice(_MONTHS), draw.randint(1, 28), draw.choice((2024, 2025, 2026))
    said = draw.choice((f"{day} {month} {year}", f"{month} {day}, {year}"))
    return said, f"{year}-{_NUMBERS[month]:02d}-{day:02d}"


def _time(draw: Random) -> tuple[str, str]:
    """A time of day as people write it, and in 24 hours."""
    hour, minute = draw.randint(7, 20), draw.choice((0, 15, 30, 45))
    half = "am" if hour < 12 else "pm"
    said = f"{(hour - 1) % 12 + 1}:{minute:02d} {half}"
    return said, f"{hour:02d}:{minute:02d}"


def _invoice(draw: Random) -> Sample:
    seller = draw.choice(("Nandi Tools", "Hoysala Print House", "Café Duval", "Bright & Sons"))
    number, cents = f"{draw.choice('ABKR')}-{draw.randint(1000, 9999)}", draw.randint(1999, 999900)
    said, iso = _date(draw)
    due = draw.choice((14, 30, None))
    amount = f"{cents / 100:,.2f}"
    text = f"{seller} sends invoice {number} of {said}. The total is {amount} euros, shipping included."
    text += f" Please pay within {due} days." if due else " Thank you for your order."
    return Sample(
        text,
        {
            "seller": ("the company that sends the invoice", "normalised", seller),
            "number": ("the invoice number", "exact", number),
            "date": ("the date of the invoice, YYYY-MM-DD", "exact", iso),
            "total": ("the total in euros, a number", "number", cents / 100),
            "due_days": ("days until it must be paid, an integer", "number", due),
        },
    )


def _reminder(draw: Random) -> Sample:
    task = draw.choice(("call the electrician", "water the basil", "pick up the saree", "renew the bus pass"))
    said_day, iso = _date(draw)
    said_time, time = _time(draw)
    person = draw.choice((*_PEOPLE, None))
    text = f"Hey, can you remind me to {task} on {said_day} at {said_time}?"
    text += f" {person} asked me twice already." if person else ""
    return Sample(
        text,
        {
            "task": ("what to do, in the words of the text", "normalised", task),
            "date": ("YYYY-MM-DD", "exact", iso),
            "time": ("HH:MM in 24 hours", "exact", time),
            "person": ("the person named", "normalised", person),
        },
    )


def _contact(draw: Random) -> Sample:
    name, city = draw.choice(_PEOPLE), draw.choice(_CITIES)
    phone = f"+91 {draw.randint(70000, 99999)} {draw.randint(10000, 99999)}"
    mail = draw.choice((f"{name.split()[1].lower()}@example.org", None))
    text = f"{name} moved to {city} last year. The number is {phone}"
    text += f", and mail goes to {mail}." if mail else "; there is no other way to reach them."
    return Sample(
        text,
        {
            "name": ("full name", "normalised", name),
            "city": ("where the person lives", "normalised", city),
            "phone": ("the phone number, digits only", "number", int(phone.replace(" ", "")[1:])),
            "email": ("the mail address", "exact", mail),
        },
    )


def _recipe(draw: Random) -> Sample:
    dish = draw.choice(("bisi bele bath", "lemon rice", "ratatouille", "lentil soup"))
    pool = ("onions", "tomatoes", "mustard seeds", "curry leaves", "garlic", "lentils", "rice", "lemon juice")
    items = draw.sample(pool, draw.randint(3, 5))
    minutes, people = draw.choice((20, 35, 45, 60)), draw.choice((2, 4, 6, None))
    listed = ", ".join(items[:-1]) + f" and {items[-1]}"
    text = f"For {dish} you need {listed}. It takes {minutes} minutes"
    text += f" and feeds {people} people." if people else " from start to table."
    return Sample(
        text,
        {
            "dish": ("name of the dish", "normalised", dish),
            "ingredients": ("a list of the ingredients as the text names them", "set", items),
            "minutes": ("how long it takes, an integer", "number", minutes),
            "serves": ("number of people, an integer", "number", people),
        },
    )


def _parcel(draw: Random) -> Sample:
    code = f"{draw.choice(('QX', 'LM', 'TR'))}{draw.randint(10**7, 10**8 - 1)}"
    grams = draw.randint(3, 180) * 100
    start, end = draw.sample(_CITIES, 2)
    signed = draw.random() < 0.5
    text = f"Parcel {code}, {grams / 1000:g} kg, left {start} this morning and is on its way to {end}. "
    text += "Somebody must sign for it." if signed else "It can be left at the door without a signature."
    return Sample(
        text,
        {
            "code": ("the tracking code", "exact", code),
            "weight_kg": ("weight in kilograms, a number", "number", grams / 1000),
            "from": ("the city it left", "normalised", start),
            "to": ("the city it goes to", "normalised", end),
            "signature": ("true where somebody must sign, else false", "exact", signed),
        },
    )


def _job(draw: Random) -> Sample:
    title, city = draw.choice(("nurse", "welder", "data engineer", "primary teacher")), draw.choice(_CITIES)
    languages = draw.sample(("Kannada", "English", "French", "German", "Swahili"), draw.randint(1, 3))
    pay, remote = draw.choice((*range(28000, 90000, 3500), None)), draw.random() < 0.5
    text = f"We look for a {title} in {city} who speaks {' and '.join(languages)}. "
    text += "Working from home is possible. " if remote else "The work is on site only. "
    text += f"We pay {pay:,} a year." if pay else "Pay as agreed."
    return Sample(
        text,
        {
            "title": ("the job", "normalised", title),
            "city": ("where", "normalised", city),
            "languages": ("a list of the languages", "set", languages),
            "remote": ("true where working from home is possible, else false", "exact", remote),
            "salary": ("pay a year, an integer", "number", pay),
        },
    )


def _measurement(draw: Random) -> Sample:
    place, tenths = draw.choice(_CITIES), draw.randint(-120, 410)
    humidity, wind = draw.randint(20, 98), draw.choice((*range(5, 80, 5), None))
    said, time = _time(draw)
    text = f"At {said} the station in {place} read {tenths / 10:.1f} degrees Celsius at {humidity} percent humidity"
    text += f", with wind of {wind} km/h." if wind else "; the wind gauge was out of order."
    return Sample(
        text,
        {
            "place": ("the city of the station", "normalised", place),
            "time": ("HH:MM in 24 hours", "exact", time),
            "celsius": ("temperature, a number", "number", tenths / 10),
            "humidity": ("in percent, an integer", "number", humidity),
            "wind_kmh": ("wind in km/h, an integer", "number", wind),
        },
    )


def _prescription(draw: Random) -> Sample:
    patient, drug = draw.choice(_PEOPLE), draw.choice(("amoxicillin", "metformin", "ibuprofen", "cetirizine"))
    dose, times = draw.choice((5, 10, 250, 400, 500)), draw.randint(1, 3)
    days = draw.choice((5, 7, 10, None))
    allergies = draw.sample(("penicillin", "peanuts", "latex"), draw.randint(0, 2))
    often = ("once", "twice", "three times")[times - 1]
    text = f"{patient} takes {drug} {dose} mg {often} a day"
    text += f" for {days} days." if days else " until further notice."
    text += f" Known allergies: {', '.join(allergies)}." if allergies else " No allergies are known."
    return Sample(
        text,
        {
            "patient": ("full name", "normalised", patient),
            "drug": ("the medicine", "normalised", drug),
            "dose_mg": ("one dose in mg, a number", "number", dose),
            "times_a_day": ("an integer", "number", times),
            "days": ("for how many days, an integer", "number", days),
            "allergies": ("a list, empty where none is known", "set", allergies),
        },
    )


DOMAINS: dict[str, Callable[[Random], Sample]] = {
    "invoice": _invoice,
    "reminder": _reminder,
    "contact": _contact,
    "recipe": _recipe,
    "parcel": _parcel,
    "job": _job,
    "measurement": _measurement,
    "prescription": _prescription,
}
"""Domain to what draws one of its samples."""
