"""Flower's ClientApp: the adapters arrive, a client's local steps follow, and the adapters go back."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.flower.task import Task, local_training

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of the client whose number Flower calls the partition.

    A simulated client of Flower is nothing but its context: whichever actor is free trains it. The actor keeps the data
    for the next one, and the model too unless the task says otherwise.
    """
    config = dict(message.content["config"])
    round = config.pop("server-round") - 1
    task = Task(**config)
    training = local_training(task)
    if task.model_per_message:
        training.renew()
    client = training.data.client_names[context.node_config["partition-id"]]
    training.load(message.content["arrays"].to_torch_state_dict())
    loss = training.train(client, round)
    metrics = {"num-examples": training.data.client_sizes[client], "loss": loss}
    content = RecordDict({"arrays": ArrayRecord(training.adapters()), "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)
