"""Steps: what is done with objects."""

from __future__ import annotations

from sqlalchemy.orm import make_transient

from tests.state_machine.machine.sessions import SessionsAndModels
from tests.state_machine.model.parts import Thing
from tests.state_machine.tables import Extra, Item


class ObjectSteps(SessionsAndModels):
    """What is done with one object, or with all that a session knows."""

    def new(self, who: int, name: str, amount: int, second: bool) -> None:
        who, session, model = self.pick(who)
        if not model.usable:
            return
        values = {"id": self.next(), "name": name, "amount": amount}
        thing = Thing((Extra if second else Item)(**values), self.last, "pending", values)
        model.things.append(thing)
        session.add(thing.real)

    def change(self, who: int, number: int, change: str | int) -> None:
        who, _, model = self.pick(who)
        thing = self.thing(model, number, "transient", "pending", "persistent", "detached")
        if thing is None or not model.usable:
            return
        attribute = "name" if isinstance(change, str) else "amount"
        setattr(thing.real, attribute, change)
        model.change(thing, attribute, change)

    def read(self, who: int, number: int, attribute: str) -> None:
        who, _, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "persistent", "detached")
        if thing is None:
            return
        self.both(
            who,
            lambda: getattr(thing.real, attribute),
            lambda _: model.read(thing, attribute),
        )

    def delete(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending", "transient")
        if thing is None or not model.usable:
            return
        self.both(who, lambda: session.delete(thing.real), lambda _: model.delete(thing))

    def add_again(self, who: int, number: int, name: str, amount: int, anew: bool) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number)
        if thing is None or not model.usable:
            return
        if thing.state == "transient" or (anew and thing.state == "detached"):
            make_transient(thing.real)
            thing.state, thing.gone, thing.id = "transient", False, self.next()
            for key, value in (("id", thing.id), ("name", name), ("amount", amount)):
                setattr(thing.real, key, value)
                model.change(thing, key, value)
        self.both(who, lambda: session.add(thing.real), lambda _: model.add(thing))

    def expunge(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending")
        if thing is None or not model.usable:
            return
        self.both(who, lambda: session.expunge(thing.real), lambda _: model.expunge(thing))

    def expire(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent")
        if thing is None:
            return
        session.expire(thing.real)
        thing.expire()

    def expire_all(self, who: int) -> None:
        who, session, model = self.pick(who)
        session.expire_all()
        for thing in model.identities.values():
            thing.expire()

    def refresh(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        thing = self.thing(model, number, "persistent", "pending", "detached")
        if thing is None:
            return
        self.both(who, lambda: session.refresh(thing.real), lambda _: model.refresh(thing))

    def get(self, who: int, number: int) -> None:
        who, session, model = self.pick(who)
        self.both(who, lambda: session.get(Item, number), lambda real: model.get(number, real))
