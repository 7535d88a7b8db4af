"""The views: an HTML page with a form, and JSON.

    DATABASE_URL=postgresql://… flask --app examples.bank.app create-tables
    DATABASE_URL=postgresql://… flask --app examples.bank.app run

The app has no users and asks for no password: it is an example, not a bank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation

from flask import (
    Blueprint,
    Flask,
    abort,
    current_app,
    jsonify,
    redirect,
    render_template,
    request,
    url_for,
)
from flask.typing import ResponseReturnValue
from sqlalchemy import or_
from sqlalchemy.exc import IntegrityError
from werkzeug.exceptions import HTTPException

from .database import db
from .models import Account, Transfer, create_tables

bank = Blueprint("bank", __name__, template_folder="templates")

LARGEST_ID = 2**31 - 1
LARGEST_AMOUNT = Decimal("1000000000")

#: What the database's constraints mean, in words for the user.
REFUSALS = {
    "account_not_overdrawn": "There is not enough money on the account.",
    "account_below_ceiling": "An account can't hold that much.",
}


def create_app(database_url: str | None = None) -> Flask:
    """Make the app. Sends nothing to the database.

    :param database_url: The database with the bank's tables. If it is left out, the environment's
        ``DATABASE_URL`` is used.
    :returns: The app.
    """
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = database_url or os.environ["DATABASE_URL"]
    app.config["RATE_SECONDS"] = 0.3
    db.init_app(app)
    app.register_blueprint(bank)
    app.cli.command("create-tables")(create_tables)
    return app


# -- reading: each query stands alone, no transaction is open before, between or after -------------


@bank.get("/")
def page(error: str | None = None) -> str:
    """Show the page with all accounts, the latest transfers and a form for the next transfer.

    If the request names a currency, the view asks another service for the rate, between two reads.
    """
    accounts = Account.query.order_by(Account.owner).all()
    currency = request.args.get("currency")
    rate = None if currency is None else exchange_rate(currency)
    transfers = Transfer.query.order_by(Transfer.id.desc()).limit(10).all()
    return render_template(
        "bank.html",
        accounts=accounts,
        transfers=transfers,
        error=error,
        form=request.form,
        rate=rate,
        currency=currency,
    )


@bank.get("/accounts")
def list_accounts() -> ResponseReturnValue:
    """Return all accounts."""
    return jsonify([account.to_dict() for account in Account.query.order_by(Account.id)])


@bank.get(f"/accounts/<int(max={LARGEST_ID}):account_id>")
def read_account(account_id: int) -> ResponseReturnValue:
    """Return one account."""
    return jsonify(db.get_or_404(Account, account_id).to_dict())


@bank.get(f"/accounts/<int(max={LARGEST_ID}):account_id>/overview")
def read_overview(account_id: int) -> ResponseReturnValue:
    """Return an account in another currency, and its latest transfers.

    Another service knows the rate. While the view waits for this service, no transaction is open,
    and the connection is kept only if the pool has others to spare.
    """
    account = db.get_or_404(Account, account_id)
    rate = exchange_rate(request.args.get("currency", "EUR"))
    mine = or_(Transfer.source_id == account_id, Transfer.target_id == account_id)
    transfers = Transfer.query.filter(mine).order_by(Transfer.id.desc()).limit(10).all()
    return jsonify(
        account=account.to_dict(),
        worth=round(account.balance * rate, 2),
        transfers=[transfer.to_dict() for transfer in transfers],
    )


# -- writing: what belongs together is in one `with db.session.begin():` ---------------------------


@bank.post("/accounts")
def open_account() -> ResponseReturnValue:
    """Open an account, or return the account that the owner has already."""
    values = posted_json()
    owner, balance = owner_from(values), amount_from(values, "balance", least="0")
    with refusals():
        account, opened = Account.open(owner, balance)
    return jsonify(account.to_dict()), 201 if opened else 200


@bank.post("/transfers")
def post_transfer() -> ResponseReturnValue:
    """Transfer money."""
    return jsonify(transfer_from(posted_json()).to_dict()), 201


@bank.post("/")
def submit_form() -> ResponseReturnValue:
    """Transfer money, as the page's form asks for it."""
    try:
        transfer_from(request.form)
    except HTTPException as error:
        return page(error.description), error.code or 500
    return redirect(url_for("bank.page"), 303)


def transfer(source_id: int, target_id: int, amount: Decimal) -> Transfer:
    """Move money from one account to another: all of it happens, or nothing.

    :param source_id: The account that pays.
    :param target_id: The account that receives.
    :param amount: The amount.
    :returns: The transfer, which is stored.
    :raises werkzeug.exceptions.HTTPException: with status 404 if there is no such account, or 409
        if the transfer breaks a rule.
    """
    with refusals(), db.session.begin():
        accounts = Account.lock(source_id, target_id)
        for account_id in (source_id, target_id):
            if account_id not in accounts:
                abort(404, f"There is no account {account_id}.")
        accounts[source_id].balance -= amount
        accounts[target_id].balance += amount
        done = Transfer(source_id=source_id, target_id=target_id, amount=amount)
        db.session.add(done)
    return done


@contextmanager
def refusals() -> Iterator[None]:
    """Answer 409, with a text for the user, if the database refuses what breaks a rule."""
    try:
        yield
    except IntegrityError as error:
        said = getattr(error.orig, "diag", None)  # both drivers have it
        rule = getattr(said, "constraint_name", "")
        abort(409, REFUSALS.get(rule, "The database refuses it."))


# -- what comes in from outside --------------------------------------------------------------------


def exchange_rate(currency: str) -> Decimal:
    """Return the worth of one unit in another currency, in place of a call to another service."""
    time.sleep(current_app.config["RATE_SECONDS"])
    rates = {"EUR": Decimal("0.86"), "GBP": Decimal("0.74"), "CHF": Decimal("0.80")}
    if currency not in rates:
        abort(400, f"The currency is one of {', '.join(rates)}.")
    return rates[currency]


def posted_json() -> Mapping[str, object]:
    """Return the JSON object that was posted."""
    values = request.get_json(silent=True)
    if not isinstance(values, dict):
        abort(400, "Post a JSON object, with Content-Type: application/json.")
    return values


def transfer_from(values: Mapping[str, object]) -> Transfer:
    """Do the transfer that was posted."""
    source_id, target_id = id_from(values, "source_id"), id_from(values, "target_id")
    if source_id == target_id:
        abort(400, "Choose two different accounts.")
    return transfer(source_id, target_id, amount_from(values, "amount", least="0.01"))


def owner_from(values: Mapping[str, object]) -> str:
    """Return the posted name."""
    owner = values.get("owner")
    if not isinstance(owner, str) or not owner.isprintable() or not 0 < len(owner.strip()) <= 80:
        abort(400, "The owner is a name of 1 to 80 characters.")
    return owner.strip()


def id_from(values: Mapping[str, object], name: str) -> int:
    """Return a posted account number."""
    text = str(values.get(name))
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > LARGEST_ID:
        abort(400, f"{name} is the number of an account.")
    return int(text)


def amount_from(values: Mapping[str, object], name: str, least: str) -> Decimal:
    """Return a posted amount of money, in units and cents."""
    try:
        amount = Decimal(str(values.get(name)))
        if Decimal(least) <= amount <= LARGEST_AMOUNT and amount == round(amount, 2):
            return round(amount, 2) + 0  # which makes a negative zero positive
    except InvalidOperation:  # not a number, or NaN
        pass
    abort(400, f"{name} is an amount of at least {least}, with two decimals at most.")


@bank.app_errorhandler(HTTPException)
def show_error(error: HTTPException) -> ResponseReturnValue:
    """Answer errors in JSON, too."""
    response = error.get_response()
    response.set_data(jsonify(error=error.description).get_data())
    response.content_type = "application/json"
    return response
