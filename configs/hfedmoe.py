"""HFedMoE on a laptop: a Switch-style classifier of BBC News over 20 unequal clients.

Reproduces: the method of arXiv 2601.00583 (expert selection by the information
bottleneck under device budgets, sparse expert aggregation, importance-weighted
gating), at a size that needs no accelerator and no network.

    python -m launch.main --config=configs/hfedmoe.py            # two minutes on 2 cores
    python -m launch.main --config=configs/hfedmoe.py:smoke      # half a minute
    python -m launch.main --config=configs/hfedmoe.py:gradient   # see the presets below
"""

from ml_collections import ConfigDict

from hfedmoe_jax.registry import unknown_name

MEGABYTE = 1e6
MEGABIT = 1e6
GIGAFLOP = 1e9


def device(share: float, memory_bytes: float, flop_per_s: float, uplink_bps: float, downlink_bps: float):
    """Returns a device class: its share of the clients and its profile."""
    return ConfigDict(
        dict(
            share=share,
            memory_bytes=memory_bytes,
            flop_per_s=flop_per_s,
            uplink_bps=uplink_bps,
            downlink_bps=downlink_bps,
        )
    )


def bbc(config: ConfigDict) -> ConfigDict:
    """The main job, and the default. Two minutes on 2 cores."""
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """Everything once, in half a minute: a tiny model, four clients, three rounds."""
    config.model.update(width=32, hidden=32, num_experts=4)
    config.fl.update(clients=4, clients_per_round=3, rounds=3, local_steps=2, batch_size=8)
    config.budget.fraction = 0.5
    config.data.update(seq_len=32, vocab_size=1000, long_text="truncate")
    config.eval.update(every=1, max_examples=128)
    config.checkpoint.every = 1
    return config


def gradient(config: ConfigDict) -> ConfigDict:
    """Task information from gradient contributions of the training passes, as a running mean."""
    config.importance.update(estimate="gradient", refresh="previous")
    return config


def active(config: ConfigDict) -> ConfigDict:
    """A quarter of the experts for everyone, in the training pass's forward too."""
    config.fl.forward = "active"
    config.importance.refresh = "previous"
    config.budget.fraction = 0.25
    return config


def literal(config: ConfigDict) -> ConfigDict:
    """Equation (21) as printed: without normalisation the routers shrink towards uniform routing."""
    config.aggregation.literal_gating = True
    return config


def unreliable(config: ConfigDict) -> ConfigDict:
    """What HFedMoE is up against: clients that fail when a batch needs more experts than they have."""
    config.fl.algorithm = "fedavg_dropout"
    config.fl.dropout_probability = 0.1
    return config


def agnews(config: ConfigDict) -> ConfigDict:
    """AG News from files: add --config.data.train_path=... and --config.data.test_path=...

    Two topics a client, 80 rounds.
    """
    config.data.update(source="file", text_column="description", tokenizer="bpe", long_text="truncate")
    config.partition.update(name="shards", shards_per_client=2)
    config.fl.rounds = 80
    config.eval.update(every=4, max_examples=2000)
    return config


def pod(config: ConfigDict) -> ConfigDict:
    """For accelerators: a wider model in bfloat16, experts over two devices, 64 of 256 clients a round.

    A quarter of the experts for everyone, chosen once a round, so that a client holds nothing of the
    others. Two devices at least; on several hosts the same command, see docs/hosts.md.
    """
    config.model.update(width=512, num_heads=8, hidden=2048, num_experts=32, top_k=2, num_layers=4)
    config.model.update(precision="bfloat16", remat=True)
    config.fl.update(clients=256, clients_per_round=64, forward="active")
    config.importance.refresh = "round"
    config.budget.fraction = 0.25
    config.mesh.experts = 2
    return config


def scaffold(config: ConfigDict) -> ConfigDict:
    """Control variates against the drift of unlike clients (arXiv 1910.06378), two topics a client."""
    config.fl.algorithm = "scaffold"
    config.client.update(optimizer="sgd", learning_rate=0.1)
    config.partition.update(name="shards", shards_per_client=2)
    return config


def private(config: ConfigDict) -> ConfigDict:
    """DP-FedAvg (arXiv 1710.06963): clipped updates, Gaussian noise, and the epsilon spent.

    Twenty clients are far too few to hide one: this epsilon protects nobody. A useful one takes thousands of
    clients and more noise.
    """
    config.fl.algorithm = "dp_fedavg"
    config.dp.update(clip_norm=0.5, noise_multiplier=0.1)
    return config


def compressed(config: ConfigDict) -> ConfigDict:
    """HFedMoE whose clients send a tenth of every tensor, with error feedback (arXiv 1809.07599)."""
    config.fl.update(algorithm="topk", base="hfedmoe")
    config.compression.fraction = 0.1
    return config


def fedmoe(config: ConfigDict) -> ConfigDict:
    """Router rows averaged over the clients that trained their expert (arXiv 2408.11304, this part of it)."""
    config.fl.algorithm = "fedmoe"
    return config


def frozen(config: ConfigDict) -> ConfigDict:
    """Experts, routers and head learn alone; nobody trains or sends embeddings, attention and norms."""
    config.model.train = "experts_router_head"
    return config


def agnews_minilm(config: ConfigDict) -> ConfigDict:
    """AG News from MiniLM with mixtures in its last two layers; embeddings and attention are frozen.

    A quarter of the experts for everyone, Dirichlet 0.5. After `make pretrained`; add
    --config.data.train_path=... and --config.data.test_path=... With 41,000 texts six minutes on 2 cores, and
    two to seven before the first round. `split` keeps experts small: those of btx differ more, and have 16
    times the parameters (docs/pretrained.md).
    """
    config.data.update(source="file", text_column="title,description", long_text="truncate")
    config.data.tokenizer = "checkpoint"
    config.model.update(family="bert", source="minilm", upcycling="split", num_experts=16, top_k=2)
    config.model.update(train="experts_router_head", cache_trunk=True)
    config.partition.alpha = 0.5
    config.budget.fraction = 0.25
    config.fl.rounds = 60
    config.eval.update(every=5, max_examples=2000)
    return config


def decoder(config: ConfigDict) -> ConfigDict:
    """A Hugging Face mixture of experts: add --config.model.source=DIRECTORY. Next tokens of BBC News.

    Experts and routers learn, a quarter of the experts for everyone; the fine-tuned model is written as a
    directory that `transformers` loads. Parameters are float32, and trained experts have two moments of Adam.
    """
    config.model.update(family="decoder", train="router")
    config.data.tokenizer = "checkpoint"
    config.task.name = "language_modeling"
    config.model.eval_capacity_factor = 0  # drops no token, as on the hub
    config.budget.fraction = 0.25
    config.client.learning_rate = 1e-4
    return config


def switch_base_64(config: ConfigDict) -> ConfigDict:
    """Switch-Base with 64 experts a layer (3.8 billion parameters): the name of a text's class is the answer.

    Adapters of rank 8 over an nf4 base learn (QLoRA, `pip install qwix`), a quarter of the experts each.
    As it is it serves --dry_run, in half a minute and without weights; to train add
    --config.model.source=DIRECTORY.
    """
    config.model.update(family="switch_t5", source="switch_base_64", train="lora", base="nf4")
    config.data.tokenizer = "checkpoint"
    config.task.name = "text_to_text"
    config.fl.batch_size = 8
    config.budget.fraction = 0.25
    config.client.learning_rate = 1e-4
    return config


def deepseek_moe_16b(config: ConfigDict) -> ConfigDict:
    """DeepSeekMoE 16B (64 experts a layer and 2 for every token): next tokens of BBC News.

    Adapters of rank 8 over an nf4 base learn (QLoRA, `pip install qwix`), a quarter of the experts each.
    As it is it serves --dry_run, in half a minute and without weights; to train add
    --config.model.source=DIRECTORY.
    """
    config = decoder(config)
    config.model.update(source="deepseek_moe_16b", train="lora", base="nf4")
    config.fl.batch_size = 8
    return config


def banking_minilm(config: ConfigDict) -> ConfigDict:
    """BANKING77 (77 intents of a bank's customers) as `agnews_minilm`; texts of the hub, shorter.

    After `make pretrained`. Without a network add --config.data.source=file, --config.data.train_path=... and
    --config.data.test_path=..., files with the columns text and label.
    """
    config = agnews_minilm(config)
    config.data.update(source="hub:PolyAI/banking77", text_column="text", seq_len=32)
    return config


def smollm2_mcq(config: ConfigDict) -> ConfigDict:
    """Multiple choice with SmolLM2-135M, mixtures of 8 experts in its last two layers, by LoRA of rank 8.

    After `make pretrained`; add --config.data.train_path=... and --config.data.test_path=... with the
    columns question, choices and answer. docs/data.md has the flags of ARC, OpenBookQA, CommonsenseQA, MMLU,
    PIQA and HellaSwag, by path and by name. A quarter of the experts for everyone.
    """
    config.model.update(family="decoder", source="smollm2", upcycling="split", num_experts=8, top_k=2)
    config.model.update(train="lora", eval_capacity_factor=0)
    config.task.name = "multiple_choice"
    config.data.update(source="file", text_column="question", choices_column="choices", label_column="answer")
    config.data.update(tokenizer="checkpoint", seq_len=128)
    config.partition.name = "iid"
    config.budget.fraction = 0.25
    config.fl.update(clients_per_round=5, rounds=10, local_steps=4, batch_size=8)
    config.client.learning_rate = 1e-4
    config.eval.update(every=5, batch_size=8, max_examples=200)
    return config


def smollm2_flora(config: ConfigDict) -> ConfigDict:
    """The same with FLoRA: what clients' adapters multiply to is added to the frozen matrices each round."""
    config = smollm2_mcq(config)
    config.fl.update(algorithm="flora", base="hfedmoe")
    return config


PRESETS = {
    preset.__name__: preset
    for preset in (
        bbc, smoke, gradient, active, literal, unreliable, agnews, pod,
        scaffold, private, compressed, fedmoe, frozen, agnews_minilm, banking_minilm, decoder,
        smollm2_mcq, smollm2_flora, switch_base_64, deepseek_moe_16b,
    )
}  # fmt: skip


def get_config(preset: str = "bbc") -> ConfigDict:
    """Returns the config of a preset (see `PRESETS`)."""
    config = ConfigDict()
    config.experiment = "hfedmoe"
    config.seed = 0

    data = config.data = ConfigDict()
    data.source = "bbc_news"  # bbc_news | file | hub:NAME | tfds:NAME
    data.train_path = ""  # file: parquet, csv, tsv, json or jsonl; a folder or a pattern of such files
    data.validation_path = ""  # file: optional; without it a validation split is cut from the training file
    data.test_path = ""  # file: optional; without it a test split is cut from the training file
    data.separator = ""  # csv, tsv: between two fields of a line; "": a comma, for tsv a tab
    data.header = True  # csv, tsv: the first line names the columns; False: they are named 1, 2, ...
    data.subset = ""  # hub, tfds: which configuration of a data set that has several
    data.train_split = "train"  # hub, tfds
    data.validation_split = ""  # hub, tfds; "": cut from the training split
    data.test_split = ""  # hub, tfds; "": the split "test" if it has labels, else cut
    data.text_column = "text"  # several: with commas between them, or "{title}: {description}"
    data.label_column = "label"  # language_modeling: may be empty
    data.choices_column = ""  # multiple_choice: of lists, or several with commas between them, a choice each
    data.prompt = r"Question: {}\nAnswer:"  # multiple_choice: {choices} lists them, for letters
    data.client_column = ""  # natural partition: the column that names a row's client
    data.cache_dir = ""  # hub, tfds: where prepared data sets lie
    data.validation_fraction = 0.15
    data.test_fraction = 0.15
    data.holdout_fraction = 0.1  # of each client's own documents, for its own accuracy
    data.tokenizer = (
        "wordpiece"  # wordpiece | bpe, trained on the training texts | checkpoint (of model.source)
    )
    data.vocab_size = 8192
    data.seq_len = 64  # tokens
    data.long_text = "split"  # split (into passages) | truncate

    partition = config.partition = ConfigDict()
    partition.name = "dirichlet"  # iid | dirichlet | shards | column
    partition.alpha = 0.3  # dirichlet concentration
    partition.shards_per_client = 2  # shards

    task = config.task = ConfigDict()
    task.name = "classification"  # | text_to_text (switch_t5) | language_modeling, multiple_choice (decoder)

    model = config.model = ConfigDict()
    model.family = "switch"  # switch (from scratch) | bert, decoder, switch_t5 (start from model.source)
    model.source = ""  # a directory; minilm (bert), smollm2 (decoder); with --dry_run a published size, too
    model.upcycling = "split"  # of a dense source: its networks become experts: copy | split | cluster | btx
    model.train = "all"  # all | experts | experts_router_head | lora, or an expression, e.g. "router|norm"
    model.lora_rank = 8  # lora: of every expert's matrices and attention's projections
    model.adapters = ""  # lora: a directory of PEFT to start from; "": new adapters
    model.base = "float32"  # lora: how the frozen matrices are kept: float32 | bfloat16 | int8 | nf4
    model.lora_alpha = 16.0  # lora: adapters count alpha / rank
    model.cache_trunk = False  # compute the frozen layers below the experts once a passage, kept on disk
    model.num_layers = 2
    model.width = 128
    model.num_heads = 4
    model.hidden = 256  # of each expert
    model.num_experts = 8  # in each layer
    model.top_k = 1  # experts of a token
    model.capacity_factor = 1.5  # slots of an expert in training over an even share of the tokens; 0: for all
    model.eval_capacity_factor = 2.0  # the same in evaluation
    model.load_balance = 0.01  # weight of the load-balancing loss
    model.precision = "float32"  # of the products: float32 | bfloat16
    model.remat = False  # compute most of a layer again in the backward pass instead of keeping it

    fl = config.fl = ConfigDict()
    fl.algorithm = "hfedmoe"  # see hfedmoe_jax/algorithms
    fl.base = "fedavg"  # what an algorithm that is more than a composition builds on, e.g. scaffold
    fl.clients = 20
    fl.clients_per_round = 10
    fl.rounds = 40  # 0: the start is evaluated
    fl.local_steps = 8
    fl.batch_size = 16
    fl.dropout_probability = 0.0  # that a sampled client drops out of the round
    fl.forward = "routed"  # routed (the paper) | active (forward fits the budget too)
    fl.score = ""  # these three replace the algorithm's own part, for ablations
    fl.expert_rule = ""
    fl.gating_rule = ""
    fl.chunk = 0  # clients computed at once on an accelerator; 0: by its memory

    importance = config.importance = ConfigDict()
    importance.estimate = "routing"  # of the task information: routing | gradient
    importance.unit = "sample"  # x_i of (3)-(16): sample (the paper; mean over its tokens) | token
    importance.refresh = "step"  # step | previous | round
    importance.lam = 0.5  # (5)
    importance.beta = 0.1  # (14)

    aggregation = config.aggregation = ConfigDict()
    aggregation.tau = 0.0  # (16): usage from which a trained expert is dominant
    aggregation.literal_gating = False  # (21) as printed, without normalisation

    client = config.client = ConfigDict()
    client.optimizer = "adam"  # sgd | sgdm | adam | yogi
    client.learning_rate = 1e-3
    client.learning_rate_decay = 1.0  # of the learning rate: its factor from round to round
    client.momentum = 0.9
    client.second_momentum = 0.999
    client.epsilon = 1e-8
    client.proximal_mu = 0.01  # fedprox

    dp = config.dp = ConfigDict()  # dp_fedavg
    dp.clip_norm = 1.0  # of a client's whole update
    dp.noise_multiplier = 1.0  # standard deviation of the noise over clip_norm
    dp.delta = 1e-5

    compression = config.compression = ConfigDict()
    compression.fraction = 0.1  # topk: of each tensor's values

    server = config.server = ConfigDict()
    server.optimizer = ""  # replaces the algorithm's own
    server.learning_rate = 0.0  # 0: 1 for sgd and sgdm, 0.01 for adam and yogi
    server.momentum = 0.9
    server.second_momentum = 0.99
    server.epsilon = 1e-3

    budget = config.budget = ConfigDict()
    budget.fraction = 0.0  # of all experts, the same for every client; 0: from the devices
    budget.tiers = 0  # most compiled programs that clients of unlike budgets are spread over; 0: by chunk

    # Memory free for training. The classes stand to this small model as phones, tablets and laptops
    # stand to a large one: the first cannot train all experts, the last can.
    config.devices = ConfigDict(
        {
            "phone": device(0.4, 46.5 * MEGABYTE, 2 * GIGAFLOP, 5 * MEGABIT, 20 * MEGABIT),
            "tablet": device(0.4, 50.5 * MEGABYTE, 6 * GIGAFLOP, 20 * MEGABIT, 50 * MEGABIT),
            "laptop": device(0.2, 64 * MEGABYTE, 20 * GIGAFLOP, 50 * MEGABIT, 100 * MEGABIT),
        }
    )

    mesh = config.mesh = ConfigDict()
    mesh.experts = 1  # devices that the experts of one client's model are spread over

    evaluation = config.eval = ConfigDict()
    evaluation.every = 2  # rounds
    evaluation.batch_size = 64  # also the most of a client's own held-out passages that are judged
    evaluation.max_examples = 0  # of the validation split, each time; 0: all

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every = 5  # rounds
    checkpoint.keep = 3

    if preset not in PRESETS:
        raise unknown_name("config", preset, list(PRESETS))
    return PRESETS[preset](config)
