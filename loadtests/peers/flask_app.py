"""Flask behind Gunicorn: https://flask.palletsprojects.com/en/stable/deploying/gunicorn/

    gunicorn -k sync -w 2 loadtests.peers.flask_app:app
    gunicorn -k gthread --threads 8 loadtests.peers.flask_app:app

An instance of the model in each worker, loaded there: torch hangs in a fork that comes after its first op.
"""

from flask import Flask, jsonify, request

from loadtests.peers import model

predict = model.load()
app = Flask(__name__)


@app.post("/")
def answer():
    return jsonify(predict([request.get_data(as_text=True)])[0])


@app.get("/health")
def health():
    return "ok"
