"""The forms of a row of text: how its columns become what is read and what is learned."""
