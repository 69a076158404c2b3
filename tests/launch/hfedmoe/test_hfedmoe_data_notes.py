"""What a run prints about its data."""

from configs.hfedmoe import get_config
from hfedmoe_jax.data import Facts
from launch.hfedmoe.data_notes import print_data_notes


def printed(capsys, facts, clients=4, **partition):
    config = get_config()
    config.partition.update(partition)
    print_data_notes(facts, clients, config)
    screen = capsys.readouterr()
    return screen.out.splitlines(), screen.err.splitlines()


def test_clean_data_take_two_lines_and_no_warning(capsys):
    out, err = printed(capsys, Facts({"<b>": 1200, "pos ": 3}, unknown_share=0.0012))
    assert out == [
        "documents by label: '<b>' 1,200, 'pos ' 3",
        "characters of the training texts in [UNK]: 0.12%",
    ]
    assert err == []


def test_many_labels_are_counted(capsys):
    out, _ = printed(capsys, Facts({str(label): 1 for label in range(25)}))
    assert out[0].endswith("'19' 1 and 5 labels more")


def test_everything_that_is_worth_telling_is_told(capsys):
    facts = Facts(
        {"pos": 5, "Pos": 4},
        alike_labels=(("Pos", "pos"),),
        copies=3,
        disputed=2,
        left_out={"training: in the test set too": 7},
        moved=1,
        owners=9,
        unknown_share=0.25,
        notes=("the split test has no labels",),
    )
    out, err = printed(capsys, facts, name="column")
    text = "\n".join(out)
    assert "3 documents repeat an earlier text" in text and "training: in the test set too: 7" in text
    assert "9 owners share 4 clients; fl.clients=9" in text and "note: the split test has no labels" in text
    assert "1 texts were moved to training" in text
    assert len(err) == 3 and all(line.startswith("warning: ") for line in err)
    assert "'Pos', 'pos'" in err[0] and "2 texts have more than one label" in err[1]
    assert "25%" in err[2] and "data.tokenizer=bpe" in err[2]
