"""Files and objects of prompts."""

import gzip
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from lightning_draft.prompt_sources import read_prompts
from tests.bad_input.cases import Case, Content, python

FILES = "Prompt files"
OBJECTS = "Prompts from Python"


def _file(shown: str, name: str, content: Content, *says: str) -> Case:
    return python(FILES, shown, lambda _: read_prompts(name), *says, files={name: content})


def _object(shown: str, source: Any, *says: str) -> Case:
    return python(OBJECTS, shown, lambda _: read_prompts(source), *says)


CASES: list[Case] = [
    _file("blank", "p.txt", b"\n \n", "no prompts in", "p.txt"),
    _file("empty", "p.csv", b"", "has no columns", "write a row with the column 'prompt'"),
    _file("UTF-16", "p.txt", "a cat".encode("utf-16"), "not text in UTF-8", "save it in UTF-8"),
    _file("JSON, cut short", "p.json", b'["a cat",\n1', "is not JSON:", "(line 2, column 2)"),
    _file("JSON, no list", "p.json", b'{"prompt": "a cat"}', "must contain a list of prompts"),
    _file("JSON, nested", "p.json", b"[" * 100_000, "nested too deeply"),
    _file("JSON, a number", "p.json", b'["a cat", 3]', "row 2 is 3; a prompt is a string or a row"),
    _file(
        "JSON lines, cut short", "p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON:", "(column 11)"
    ),
    _file(
        "JSON lines, no column",
        "p.jsonl",
        b'{"prompt": "a"}\n{"text": "a"}\n',
        "line 2 has no column 'prompt', and its columns are 'text'",
    ),
    _file("JSON lines, a number", "p.jsonl", b'{"prompt": 3}\n', "line 1 has 3 (int) in the column 'prompt'"),
    _file("JSON lines, null", "p.jsonl", b'{"prompt": null}\n', "line 1 has None"),
    _file(
        "CSV, no column",
        "p.csv",
        b"text\na cat\n",
        "has no column 'prompt', and its columns are 'text'",
        "column='text'",
    ),
    _file("CSV, upper case", "p.csv", b"a,Prompt\n1,a cat\n", "column='Prompt'"),
    _file("CSV, no header", "p.csv", b"a cat, sitting\na dog\n", "write prompts without columns to a .txt file"),
    _file(
        "CSV, too many fields",
        "p.csv",
        b"prompt,n\na,1\na cat, sitting,1\n",
        "line 3 must have 2 fields like the header, not 3",
    ),
    _file("CSV, too few fields", "p.csv", b"prompt,n\na cat\n", "line 2 must have 2 fields like the header, not 1"),
    _file("CSV, open quote", "p.csv", b'prompt,n\na,1\n"a cat,1\nb,2\n', "line 3: a double quote is not closed"),
    _file("CSV, semicolons", "p.csv", b"prompt;n\na cat;1\n", "separates columns by semicolons"),
    _file("CSV, one name twice", "p.csv", b"prompt,n,n\na,1,2\n", "two columns named 'n'"),
    _file("Parquet, damaged", "p.parquet", b"PAR1 nothing", "is not a Parquet file"),
    _file("another suffix", "p.docx", b"a cat", "a suffix that is not supported; give a prompt file that ends in .txt"),
    _file("compressed", "p.txt.gz", b"a cat", "a suffix that is not supported"),
    _file(
        "UTF-8, cut within a letter",
        "p.txt",
        "a caf\u00e9".encode()[:-1],
        "p.txt",
        "not text in UTF-8",
        "save it in UTF-8",
    ),
    _file(
        "Latin-1", "p.csv", "prompt\na caf\u00e9\n".encode("latin-1"), "p.csv", "not text in UTF-8", "save it in UTF-8"
    ),
    _file("gzip under .txt", "p.txt", gzip.compress(b"a cat\n"), "p.txt", "not text in UTF-8"),
    _file("zip under .jsonl", "p.jsonl", b"PK\x03\x04\x14\x00\xff\xfe", "p.jsonl"),
    _file("Parquet under .csv", "p.csv", b"PAR1\x15\x04\xff\xff", "p.csv"),
    _file(
        "CSV under .parquet",
        "p.parquet",
        "prompt\na cat\n",
        "p.parquet is not a Parquet file",
        "give one, or a .csv file",
    ),
    _file("JSON list under .jsonl", "p.jsonl", '["a cat"]\n', "p.jsonl, line 1", "a prompt is a string or a row"),
    _file("JSON lines under .json", "p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "p.json is not JSON", "line 2"),
    _file("NUL bytes", "p.csv", b"prompt,n\na\x00cat,1\n", "p.csv contains NUL characters", "save it in UTF-8"),
    _file("a folder named p.txt", "p.txt/a", "a cat", "p.txt"),
    _file("an unfinished string in JSON", "p.json", '["a cat', "p.json is not JSON", "line 1"),
    _file(
        "UTF-16 without a mark",
        "p.txt",
        "a cat".encode("utf-16-le"),
        "p.txt contains NUL characters",
        "save it in UTF-8",
    ),
    _file("two objects in one line", "p.jsonl", '{"prompt": "a"}{"prompt": "b"}\n', "p.jsonl, line 1 is not JSON"),
    _file("a comma after a line", "p.jsonl", '{"prompt": "a"},\n', "p.jsonl, line 1 is not JSON"),
    _file("single quotes", "p.jsonl", "{'prompt': 'a'}\n", "p.jsonl, line 1 is not JSON"),
    _file("a boolean prompt", "p.jsonl", '{"prompt": true}\n', "line 1 has True"),
    _file("a list as prompt", "p.jsonl", '{"prompt": ["a"]}\n', "line 1 has ['a']"),
    _file("NaN as prompt", "p.json", '[{"prompt": NaN}]', "row 1 has nan (float)"),
    _file("only a header", "p.csv", "prompt,n\n", "no prompts in 'p.csv'"),
    _file("only blank prompts", "p.csv", "prompt,n\n ,1\n", "no prompts in 'p.csv'"),
    _file("tabs under .csv", "p.csv", "prompt\tn\na cat\t1\n", "p.csv separates columns by tabs", "rename it to .tsv"),
    _file("an empty column name", "p.csv", "prompt,,\na,1,2\n", "two columns named ''"),
    _file("Excel under .csv", "p.csv", b"PK\x03\x04\x14\x00\x06\x00\x08\xe0", "p.csv"),
    _file("a deep row", "p.jsonl", "[" * 100_000, "nested too deeply"),
    _file("a wrong line far down", "p.jsonl", '{"prompt": "a"}\n' * 3000 + "{\n", "p.jsonl, line 3001 is not JSON"),
    _file(
        "a number as negative prompt",
        "p.jsonl",
        '{"prompt": "a", "negative_prompt": 3}\n',
        "line 1 has 3 (int) in the column 'negative_prompt'",
        "the cell can be empty",
    ),
    _file("a number far down", "p.jsonl", '{"prompt": "a"}\n' * 3000 + '{"prompt": 1}\n', "line 3001 has 1 (int)"),
    python(
        FILES,
        "a link to nothing",
        lambda _: read_prompts("p.txt"),
        "there is no file 'p.txt'",
        files={"p.txt": lambda path: path.symlink_to("gone.txt")},
    ),
    _object("None", None, "prompts are of type NoneType", "give a list of strings"),
    _object("3", 3, "prompts are of type int"),
    _object("b'a cat'", b"a cat", "prompts are of type bytes"),
    _object("{'prompt': ['a cat']}", {"prompt": ["a cat"]}, "prompts are of type dict"),
    _object("a generator", (text for text in ["a"]), "prompts are of type generator"),
    _object("a set", {"a cat"}, "prompts are of type set"),
    _object("numpy strings", np.array(["a cat"]), "prompts are of type ndarray"),
    _object("[]", [], "there are no prompts in the list that was given"),
    _object("['', ' ']", ["", " "], "there are no prompts"),
    _object("[1, 2]", [1, 2], "element 1 is 1; a prompt is a string or a row"),
    _object("['a', None]", ["a", None], "element 2 is None"),
    _object("[b'a']", [b"a"], "element 1 is b'a'"),
    _object("[('a', 1)]", [("a", 1)], "element 1 is ('a', 1)"),
    _object("[['a', 'b']]", [["a", "b"]], "element 1 is ['a', 'b']"),
    _object("[{'text': 'a'}]", [{"text": "a"}], "element 1 has no column 'prompt', and its columns are 'text'"),
    _object("[{}]", [{}], "element 1 has no columns", "write a row with the column 'prompt'"),
    _object("[{'prompt': 1}]", [{"prompt": 1}], "element 1 has 1 (int)"),
    _object("a data set without the column", Dataset.from_list([{"text": "a"}]), "the data set has no column 'prompt'"),
    _object(
        "a DatasetDict",
        DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}),
        "pass one split, such as prompts['train']",
    ),
    _object("''", "", "no prompts in ''"),
    _object("nowhere.PARQUET", "nowhere.PARQUET", "there is no file 'nowhere.PARQUET'"),
    _object("nowhere.txt", "nowhere.txt", "there is no file 'nowhere.txt'", "give the path"),
    _object("./nowhere", "./nowhere", "there is no file or folder './nowhere'"),
    _object("annimals", "annimals", "there is no prompt list 'annimals'; did you mean animals"),
    _object("a red cat", "a red cat", "as a list: [a red cat]"),
    _object("'[1, 2]' as text", "[1, 2]", "'[1, 2]' is not a list of strings", "['a cat', '2 dogs']"),
    _object("'3' as text", "3", "'3' is not a list of strings"),
]
