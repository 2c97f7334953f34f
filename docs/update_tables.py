"""Put the table of attacks, as the classes document themselves, into attacks.md. Run from anywhere, without options."""

from pathlib import Path

from monai_adv.studies.attack_table import catalogue

PAGE = Path(__file__).with_name("attacks.md")
BEGIN, END = "<!-- made by: monai-adv attacks --markdown -->\n", "<!-- end -->"

if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + catalogue() + rest[rest.index(END) :], encoding="utf-8")
