"""Write the files that are generated from the specification, and print which of them changed."""

from pathlib import Path

from orchestrator.spec.manual.files import generated_files

ROOT = Path(__file__).parents[1]


def main() -> None:
    for name, text in generated_files().items():
        path = ROOT / name
        is_changed = not path.is_file() or path.read_text(encoding="utf-8") != text
        if is_changed:
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {'written' if is_changed else 'unchanged'}")


if __name__ == "__main__":
    main()
