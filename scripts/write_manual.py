"""Write the files that are made from the specification, and say which of them changed."""

from pathlib import Path

from orchestrator.spec.manual.files import made_files

ROOT = Path(__file__).parents[1]


def main() -> None:
    for name, text in made_files().items():
        path = ROOT / name
        changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if changed:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'written' if changed else 'as it was'}")


if __name__ == "__main__":
    main()
