from dllama.start import convert

convert(prog_name="python -m converter")
